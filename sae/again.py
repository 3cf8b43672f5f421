"""A finished run, measured again on its own source's held-out activations."""

from __future__ import annotations

import json
from pathlib import Path

from sae.config import TrainConfig, parse_config
from sae.config_text import read_yaml
from sae.diagnosis import diagnose_source, require_truth
from sae.diagnosis.files import save_diagnosis
from sae.directory import save_evaluation
from sae.errors import UsageError
from sae.evaluation import Evaluation, evaluate_on
from sae.kernels import require_device
from sae.locks import held
from sae.model import SAE, load
from sae.names import CONFIG, RESULT
from sae.networks.downstream import losses_of_store, require_network
from sae.networks.source import ModelSourceConfig
from sae.sources import Source
from sae.stores import StoreSourceConfig
from sae.world_source import ToySourceConfig

# What `sae.metrics.Spliced` measures, under the names of the log.
DOWNSTREAM = tuple(f"metrics/{name}" for name in ("ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "kl"))


def evaluate_run(
    out: str | Path, *, diagnose: bool = False, downstream: bool = False, device: str | None = None
) -> Evaluation:
    """Measures a finished run again, on its own source's held-out activations, and writes the result.

    With `diagnose`, also where its F1 was lost, and which features were missed and why; with `downstream`, what the
    language model behind a store's activations loses. Without them, earlier findings stay. `device` is where that model
    runs; default the run's, or the CPU.

    Raises:
        UsageError: nothing is saved there, or the source was passed from Python and cannot be opened again; or a
            diagnosis is asked for where the true features are not known.
    """
    opened = open_again(out, device)
    return measure_again(Path(out), *opened, diagnose=diagnose, downstream=downstream, device=device)


def open_again(out: str | Path, device: str | None = None) -> tuple[SAE, TrainConfig, Source]:
    """A finished run's SAE, configuration and source; `device` is where the source's language model runs."""
    out = Path(out)
    sae = load(out)
    if not (out / CONFIG).exists():
        raise UsageError(f"{out} is an SAE without a run ({CONFIG}); name activations to measure it on with --source")
    if device is not None:
        require_device(device, "--device")
    config = parse_config(read_yaml(out / CONFIG), where=str(out / CONFIG))
    if config.source is None:
        raise UsageError(
            f"{out} was trained on activations passed from Python; give others with --source, or in Python use "
            "sae.evaluation.evaluate(model, sae.HeldOut(x))"
        )
    source = config.source
    if isinstance(source, ToySourceConfig) and source.weights is not None and not source.weights.exists():
        for place in (out / source.weights.name, out.parent / source.weights.name):
            if place.exists():  # where the run lies, wherever that is now
                source = source.model_copy(update={"weights": place})
    if device is not None and isinstance(source, ModelSourceConfig):
        source = source.model_copy(update={"device": device})
    return sae, config, source.open()


def measure_again(
    out: Path,
    sae: SAE,
    config: TrainConfig,
    source: Source,
    *,
    diagnose: bool = False,
    downstream: bool = False,
    device: str | None = None,
) -> Evaluation:
    """Every metric, written into the run's directory; see `evaluate_run`."""
    n_samples = config.evaluation.n_samples
    if diagnose:
        require_truth(source)
    if downstream:
        require_network(config.source)
    with held(out):
        evaluation = evaluate_on(source, sae, n_samples)
        if downstream and isinstance(config.source, StoreSourceConfig):
            lost = losses_of_store(config.source, sae, n_samples, device or "cpu")
            named = {f"metrics/{name}": value for name, value in lost.items()}
            evaluation = Evaluation(evaluation.metrics | named, evaluation.tables)
        return _written(out, sae, source, evaluation, n_samples, diagnose=diagnose)


def _written(
    out: Path, sae: SAE, source: Source, evaluation: Evaluation, n_samples: int, *, diagnose: bool
) -> Evaluation:
    """Including what a diagnosis found, now or before."""
    before = json.loads((out / RESULT).read_text(encoding="utf-8")) if (out / RESULT).exists() else {}
    kept = {name: before[name] for name in DOWNSTREAM if name in before and name not in evaluation.metrics}
    if diagnose:
        found = diagnose_source(sae, source, evaluation, n_samples)
        save_diagnosis(out, found)
        kept |= found.metrics
    else:
        kept |= {name: value for name, value in before.items() if name.startswith("diagnosis/")}
    evaluation = Evaluation(evaluation.metrics | kept, evaluation.tables)
    save_evaluation(out, evaluation)
    return evaluation
