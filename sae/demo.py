"""`sae demo`: superposition made and undone, with every method under the same metrics.

A toy model squeezes 256 sparse features into 64 dimensions; SAEs and baselines look for the features in its hidden
activations, and each is measured against the truth.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae import baselines
from sae.config import TrainConfig
from sae.console import postfix, print_methods
from sae.directory import check_out
from sae.ensemble import Ensemble, Run
from sae.extras import require
from sae.kernels import choose
from sae.locks import DEMO_LOCK, held
from sae.model import load
from sae.names import SUMMARY
from sae.run import as_it_begins, conclude, open_run
from sae.sources import SharedSource
from sae.world_source import ToySourceConfig
from toymodels.processes import n_cores, one_thread_each
from toymodels.worlds import ToyRecipe

N_SEEDS = 3
K = 3
D_SAE = 256
TOY = "toy.safetensors"

# The SAEs. `l1_low` is the control: too little penalty gives low error, many active latents, and the wrong features.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "topk": ({"kind": "topk", "d_sae": D_SAE, "k": K}, N_SEEDS),
    "batchtopk": ({"kind": "batchtopk", "d_sae": D_SAE, "k": 2.56}, N_SEEDS),
    "l1": ({"kind": "relu", "d_sae": D_SAE, "l1_coefficient": 0.15}, N_SEEDS),
    "l1_low": ({"kind": "relu", "d_sae": D_SAE, "l1_coefficient": 0.04}, 1),
}
# Number of seeds of each baseline; only the random dictionary is a draw that matters.
BASELINES = {
    "random": N_SEEDS,
    "data_points": 1,
    "oracle": 1,
    "oracle_k": 1,
    "topk_oracle": 1,
    "pca": 1,
    "ica": 1,
    "dictionary_learning": 1,
}
Key = tuple[str, int]
"""A method and a seed."""
Named = tuple[Key, TrainConfig]
TRAIN = {"n_samples": 6_144_000, "batch_size": 2048, "lr": 3.0e-3}


def run(out: Path, seed: int, overwrite: bool) -> None:
    """Runs the whole demo into `out`, which ends as the run directory of the first TopK."""
    for package in ("plotly", "sklearn"):
        require(package, "demo", "a demo")
    check_out(out, resume=None, overwrite=overwrite)
    began = time.perf_counter()
    toy = ToySourceConfig(seed=seed, weights=out / TOY)
    saes = [
        ((method, own_seed), sae_config(out, toy, method, own_seed, first=(method, own_seed) == ("topk", seed)))
        for method, (_, n_seeds) in METHODS.items()
        for own_seed in range(seed, seed + n_seeds)
    ]
    for _, config in saes:
        check_out(config.out, resume=None, overwrite=overwrite)
    with held(out, DEMO_LOCK):
        rows, report = toy_and_saes(out, toy, saes)
    show(rows)
    print(f"\nwrote {report} after {time.perf_counter() - began:.0f} s. To try next:\n")
    next_commands = {
        f"sae eval {out}": "every metric of the TopK SAE, beside chance and the true dictionary",
        "sae demo digits": "the same trainer on a network that reads scanned digits",
        "sae train configs/toy.yaml --sae.k 5 --out runs/mine": "a run of your own",
    }
    width = max(map(len, next_commands))
    for command, what in next_commands.items():
        print(f"  {command:{width}}    {what}")


def toy_and_saes(out: Path, toy: ToySourceConfig, saes: list[Named]) -> tuple[list[dict[str, Any]], Path]:
    """Trains the toy model, then all SAEs side by side; the rows of the summary, and the report."""
    recipe = toy.recipe
    assert isinstance(recipe, ToyRecipe)
    n_steps = recipe.n_steps + sum(config.n_steps for _, config in saes)
    torch.set_num_threads(1)  # a second thread would wait for cores on which the others get ready
    lines = get_context("spawn").Queue()
    with (
        tqdm(total=n_steps, unit="step", dynamic_ncols=True) as bar,
        one_thread_each(get_ready, (lines,)) as pool,
    ):
        bar.set_description("toy model")
        for _ in range(n_cores()):
            pool.submit(int)  # starts a process

        def toy_step(step: int, losses: Tensor) -> None:
            bar.update()

        world = recipe.build(toy.seed, on_step=toy_step)
        world.model.save(out / TOY)
        rows = train_and_measure(pool, lines, out, toy, saes, bar)
        (out / SUMMARY).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return rows, pool.submit(page_of, out).result()


def sae_config(out: Path, toy: ToySourceConfig, method: str, seed: int, first: bool) -> TrainConfig:
    """The configuration of one SAE; the first TopK has `out` itself as its run directory."""
    sections = {
        "source": toy,
        "sae": METHODS[method][0],
        "train": {**TRAIN, "seed": seed},
        "log": {"every": 200},
        "out": out if first else out / f"{method}-{seed}",
    }
    return TrainConfig.model_validate(sections)


def train_and_measure(
    pool: ProcessPoolExecutor,
    lines: Any,
    out: Path,
    toy: ToySourceConfig,
    saes: Sequence[Named],
    bar: tqdm,
) -> list[dict[str, Any]]:
    """A row for each SAE and each baseline, in the order of the table."""
    done_before = bar.n
    steps = {key: 0 for key, _ in saes}
    rows: dict[Key, dict[str, Any]] = {}
    # Those of a seed see the same batches, which are drawn once. The first seed has the most of them.
    by_seed = [[one for one in saes if one[0][1] == seed] for seed in dict.fromkeys(key[1] for key, _ in saes)]
    waiting: set[Future[dict[Key, dict[str, Any]]]] = {pool.submit(sae_rows, toy, part) for part in by_seed}
    for method, n_seeds in reversed(BASELINES.items()):
        if method != "topk_oracle":
            waiting |= {
                pool.submit(baseline_row, method, seed, toy, out) for seed in range(toy.seed, toy.seed + n_seeds)
            }
    while waiting:
        finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        for job in finished:
            rows |= job.result()  # raises what the job raised, now and not at the end
            if ("topk", toy.seed) in job.result():
                waiting.add(pool.submit(baseline_row, "topk_oracle", toy.seed, toy, out))
        while not lines.empty():
            key, step, values = lines.get()
            steps[key] = step
            bar.set_description("{} seed {}".format(*key), refresh=False)
            bar.set_postfix_str(postfix(values), refresh=False)
        bar.update(done_before + sum(steps.values()) - bar.n)
    order = [*METHODS, *BASELINES]
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))]


_lines: Any = None
"""In a process of the pool: where it puts each line that is logged."""


def get_ready(lines: Any) -> None:
    """Builds and loads in a process of the pool what its first run would wait for."""
    global _lines  # noqa: PLW0603 - a queue can only be handed to a process that starts
    _lines = lines
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent hears too, and ends this process
    import scipy.optimize  # noqa: F401, PLC0415 - metrics import it when they match

    import sae.report  # noqa: F401, PLC0415 - one of them writes the page

    choose(torch.device("cpu"), torch.float32)


def sae_rows(toy: ToySourceConfig, saes: Sequence[Named]) -> dict[Key, dict[str, Any]]:
    """Trains SAEs on the same batches, and measures each; each logged line is told."""
    gc.disable()  # what steps leave in circles is little; to look for it takes 4 % of a run
    logging.getLogger("sae").setLevel(logging.WARNING)
    source = SharedSource(toy.open())
    runs: dict[Run, Key] = {}
    for key, config in saes:

        def on_line(step: int, values: Mapping[str, float], key: Key = key) -> None:
            _lines.put((key, step, dict(values)))

        runs[open_run(config, as_it_begins(config, resume=False), source, resume=False, on_line=on_line)] = key
    rows = {}
    for run, error in Ensemble(list(runs), source).feed(stop=lambda: 0):
        if error is not None:
            raise error
        method, seed = runs[run]
        seconds = run.trainer.seconds
        metrics = conclude(run, report=False).metrics
        run.close()
        rows[method, seed] = {"method": method, "seed": seed, **metrics, "seconds": seconds}
    return rows


def page_of(out: Path) -> Path:
    """Writes the report of the first TopK."""
    from sae.report import write_report  # noqa: PLC0415 - an extra, and slow to import

    return write_report([out])


def baseline_row(method: str, seed: int, toy: ToySourceConfig, out: Path) -> dict[Key, dict[str, Any]]:
    """Fits and measures one baseline on the same held-out activations as the SAEs."""
    source = toy.open()
    sae, name = (load(out), "sae_oracle") if method == "topk_oracle" else (None, method)
    given = baselines.prepare([name], source, d_sae=D_SAE, k=K, seed=seed, sae=sae)
    return {(method, seed): {**baselines.measured(name, given, source), "method": method}}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the table of methods."""
    print_methods(
        "256 features in 64 dimensions: who finds them?",
        rows,
        f"mean ± sd over {N_SEEDS} seeds, or one run. cov: share of features found with cosine > .9.\n"
        f"A random dictionary of this shape has MCC {rows[0]['recovery/mcc_chance']:.3f}.\n"
        f"oracle: the true features with non-negative sparse coding, _k with at most {K} latents; topk_oracle: TopK's "
        "dictionary coded likewise.\ndata_points: activations as dictionary. pca, ica: at most 64 components, each "
        "with both signs.",
    )
