"""`sae demo`: superposition made and undone, with every method under the same metrics.

A toy model squeezes 256 sparse features into 64 dimensions; SAEs and baselines look for the features in its hidden
activations, and each is measured against the truth.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae import baselines
from sae.baselines import Baseline
from sae.config import TrainConfig, parse_config
from sae.console import postfix, print_table, silence
from sae.errors import UsageError
from sae.evaluation import evaluate
from sae.run import CONFIG, check_out, train
from sae.sources import HeldOut, ToySource, ToySourceConfig

N_SEEDS = 3
K = 3
D_SAE = 256
SUMMARY, TOY = "summary.json", "toy.safetensors"

# The SAEs. `l1_low` is the control: too little penalty gives low error, many active latents, and the wrong features.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "topk": ({"kind": "topk", "d_sae": D_SAE, "k": K}, N_SEEDS),
    "batchtopk": ({"kind": "batchtopk", "d_sae": D_SAE, "k": 2.56}, N_SEEDS),
    "l1": ({"kind": "relu", "d_sae": D_SAE, "l1_coefficient": 0.15}, N_SEEDS),
    "l1_low": ({"kind": "relu", "d_sae": D_SAE, "l1_coefficient": 0.04}, 1),
}
TRAIN = {"n_samples": 6_144_000, "batch_size": 2048, "lr": 3.0e-3}

COLUMNS = {
    "MCC": "recovery/mcc",
    "MMCS": "recovery/mmcs",
    "coverage": "recovery/coverage_0.9",
    "F1": "recovery/f1",
    "FVU": "metrics/fvu",
    "L0": "metrics/l0",
    "dead": "sparsity/dead_features",
    "seconds": "seconds",
}


@dataclass
class Demo:
    """The demo's state: where it writes, the one progress bar, and a row for each method and seed."""

    out: Path
    seed: int
    bar: tqdm
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, method: str, seed: int, make: Callable[[], Baseline], source: ToySource, test: HeldOut) -> None:
        """Times and measures one baseline."""
        self.bar.set_description(f"{method:>12}")
        self.bar.set_postfix_str("")
        began = time.perf_counter()
        coder = make()
        values = evaluate(coder, test, source.truth).metrics
        extra = {"penalty": coder.code.penalty, "firing_threshold": coder.code.threshold} if isinstance(
            coder.code, baselines.SparseCoding
        ) else {}
        self.add(method, seed, values | extra, time.perf_counter() - began)

    def add(self, method: str, seed: int, values: Mapping[str, float], seconds: float) -> None:
        self.rows.append({"method": method, "seed": seed, **values, "seconds": seconds})


def run(out: Path, seed: int, overwrite: bool) -> None:
    """Runs the whole demo into `out`, which ends as the run directory of the first TopK."""
    require_extras()
    check_out(out, resume=False, overwrite=overwrite)
    silence()
    began = time.perf_counter()
    toy = ToySourceConfig(seed=seed)
    n_steps = -(-TRAIN["n_samples"] // TRAIN["batch_size"])
    n_runs = sum(n_seeds for _, n_seeds in METHODS.values())
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=toy.n_steps + n_runs * n_steps, unit="step", dynamic_ncols=True) as bar:
        demo = Demo(out, seed, bar)
        bar.set_description(f"{'toy model':>12}")
        source = toy.train(lambda step: bar.update(1))
        source.model.save(out / TOY)
        first = _train_saes(demo, source, overwrite)
        _measure_baselines(demo, source, first)
    (out / SUMMARY).write_text(json.dumps(demo.rows, indent=1) + "\n", encoding="utf-8")

    from sae.report import write_report  # noqa: PLC0415 - an extra, and slow to import

    report = write_report([out])
    show(demo.rows)
    print(f"\nwrote {out}/ and {report} in {time.perf_counter() - began:.0f} s. Next:\n")
    print(f"  python -c \"import sae; print(sae.load('{out}').W_dec.shape)\"      use the dictionary")
    print("  sae demo digits                                           real images: what do the latents mean?")
    print("  sae train configs/toy.yaml --sae.kind batchtopk --out runs/mine   your own run; then `sae report runs/mine`")
