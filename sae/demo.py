"""`sae demo`: superposition made and undone, with every method under the same metrics.

A toy model squeezes 256 sparse features into 64 dimensions; SAEs and baselines look for the features in its hidden
activations, and each is measured against the truth.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae import baselines
from sae.baselines import Baseline, SparseCoding, require_sklearn
from sae.config import EvaluationSection, TrainConfig
from sae.console import postfix, print_table
from sae.evaluation import evaluate
from sae.model import SAE, load
from sae.run import check_out, require_report, train
from sae.sources import ToySource, ToySourceConfig

N_SEEDS = 3
K = 3
D_SAE = 256
N_VALIDATION = 2000
N_FIT = 50_000
N_FIT_SLOW = 16_000
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




def run(out: Path, seed: int, overwrite: bool) -> None:
    """Runs the whole demo into `out`, which ends as the run directory of the first TopK."""
    require_report()
    require_sklearn()
    check_out(out, resume=False, overwrite=overwrite)
    logging.getLogger("sae").setLevel(logging.WARNING)  # the bar and the table say it all
    began = time.perf_counter()
    toy = ToySourceConfig(seed=seed, weights=out / TOY)
    n_steps = TRAIN["n_samples"] // TRAIN["batch_size"]
    n_runs = sum(n_seeds for _, n_seeds in METHODS.values())
    with tqdm(total=toy.n_steps + n_runs * n_steps, unit="step", dynamic_ncols=True) as bar:
        bar.set_description("toy model")
        model = toy.trained_model(on_step=lambda: bar.update())
        out.mkdir(parents=True, exist_ok=True)
        model.save(out / TOY)
        source = toy.open()
        rows = list(sae_rows(out, toy, source, seed, bar))
        rows += baseline_rows(source, load(out), seed, bar)
    (out / SUMMARY).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    from sae.report import write_report  # noqa: PLC0415 - an extra, and slow to import

    report = write_report([out])
    show(rows)
    print(f"\nwrote {report} after {time.perf_counter() - began:.0f} s. To try next:\n")
    print(f"  sae eval {out}                 every metric of the TopK SAE, beside chance and the true dictionary")
    print("  sae demo digits                   the same trainer on a network that reads scanned digits")
    print("  sae train configs/toy.yaml --sae.k 5 --out runs/mine      a run of your own; sae report runs/mine shows it")


def sae_rows(out: Path, toy: ToySourceConfig, source: ToySource, seed: int, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Trains and measures every SAE of METHODS."""
    for method, (options, n_seeds) in METHODS.items():
        for own_seed in range(seed, seed + n_seeds):
            first = method == "topk" and own_seed == seed
            config = TrainConfig.model_validate(
                {
                    "source": toy,
                    "sae": options,
                    "train": {**TRAIN, "seed": own_seed},
                    "out": out if first else out / f"{method}-{own_seed}",
                }
            )
            bar.set_description(f"{method} seed {own_seed}")
            start = bar.n
            began = time.perf_counter()

            def on_line(step: int, values: Mapping[str, float], start: int = start) -> None:
                bar.set_postfix_str(postfix(values), refresh=False)
                bar.update(start + step - bar.n)

            result = train(config, source, overwrite=True, report=False, on_line=on_line)
            yield {"method": method, "seed": own_seed, **result.metrics, "seconds": time.perf_counter() - began}


def baseline_rows(source: ToySource, topk: SAE, seed: int, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Measures every baseline, on the same held-out activations as the SAEs."""
    test = source.held_out("evaluation", EvaluationSection().n_samples)
    validation = source.held_out("calibration", N_VALIDATION)
    x = next(source.batches(N_FIT, seed))
    truth = source.truth
    methods: dict[str, Callable[[int], Baseline]] = {
        "random": lambda s: baselines.random_dictionary(D_SAE, x.mean(dim=0), K, s),
        "oracle": lambda s: baselines.sparse_coding(truth, truth, validation),
        "oracle_k": lambda s: baselines.sparse_coding(truth, truth, validation, K),
        "topk_oracle": lambda s: baselines.sparse_coding(topk.W_dec, truth, validation, K, topk.b_dec),
        "pca": lambda s: baselines.pca(x),
        "ica": lambda s: baselines.ica(x, s),
        "dictionary_learning": lambda s: baselines.dictionary_learning(x[:N_FIT_SLOW], D_SAE, truth, validation, K, s),
    }
    for method, make in methods.items():
        for own_seed in range(seed, seed + (N_SEEDS if method == "random" else 1)):
            bar.set_description(method)
            bar.set_postfix_str("")
            began = time.perf_counter()
            coder = make(own_seed)
            values = evaluate(coder, test, truth).metrics
            if isinstance(coder.code, SparseCoding):
                values |= {"codes/penalty": coder.code.penalty, "codes/firing_threshold": coder.code.threshold}
            yield {"method": method, "seed": own_seed, **values, "seconds": time.perf_counter() - began}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table of methods, mean ± sd over seeds."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        table.append([method, *(mean_sd([row[key] for row in own]) for key in COLUMNS.values())])
    chance = rows[0]["recovery/mcc_chance"]
    print_table(
        "256 features in 64 dimensions: who finds them?",
        ["", *COLUMNS],
        table,
        f"MCC of a random dictionary of this shape: {chance:.3f}. oracle: the true features with sparse coding; _k: at most {K}"
        f" latents; topk_oracle: TopK's dictionary, coded likewise. pca, ica: 64 components, both signs.",
    )


def mean_sd(values: Sequence[float]) -> str:
    """`.998 ± .001`, or one value alone."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"
