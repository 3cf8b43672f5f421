"""What SAEs are worth beside those of other libraries, at equal L0: `python -m sae.bench.quality`.

A rival trains on the batches that ours is given, with the step of its own trainer; then ours is asked for the L0 that
the rival has on held-out rows, and both are measured by the metrics of this library. k is the same where it decides.
A rival gets our learning rate, our warm-ups and our decay where it knows such things, as its own are made for long
runs; everything else is its own default. Ours has its defaults.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from sae import metrics
from sae.bench.contenders import OURS, tell_once
from sae.bench.loading import RivalFailed, first_line
from sae.bench.machine import machine
from sae.bench.rivals import RIVALS, Rival, Settings, Training
from sae.bench.sets import SETS, Data, data
from sae.codes import SparseCodes
from sae.config import TrainConfig
from sae.evaluation import chunk_rows
from sae.run import train
from sae.sources import HeldOut

KINDS = (
    "topk",
    "batchtopk",
    "matryoshka",
    "matching_pursuit",
    "relu",
    "gated",
    "p_annealing",
    "jumprelu",
    "transcoder",
)
# k decides here; where it does not, ours is asked for the rival's L0 under this option.
BY_K = ("topk", "matching_pursuit", "transcoder")
OPTION = {"batchtopk": "k", "matryoshka": "k"}
N_HELD_OUT = 100_000


@dataclass(frozen=True)
class Trial:
    """One training, measured on held-out rows."""

    set: str
    kind: str
    name: str
    seed: int
    lr: float
    asked: float
    """The L0 asked for: k, or what the rival had; of a rival k, which it may not know."""
    l0: float
    fvu: float
    mcc: float
    dead: float


@torch.no_grad()
def measured(held_out: HeldOut, truth: Tensor, W_dec: Tensor, reconstruct: object) -> dict[str, float]:
    """L0, FVU, MCC, and the share of dead latents; `reconstruct` gives codes and x_hat of a batch."""
    assert callable(reconstruct)
    found = metrics.Reconstruction(W_dec, metrics.scale_threshold(held_out.wanted))
    size = chunk_rows(len(W_dec))
    for x, wanted in zip(held_out.x.split(size), held_out.wanted.split(size), strict=True):
        codes, x_hat = reconstruct(x)
        found.update(wanted, x_hat, codes if isinstance(codes, SparseCodes) else SparseCodes(codes, None, len(W_dec)))
    alive = found.density() > 0
    values = found.compute()
    mcc = metrics.match_dictionary(W_dec, truth, alive).cosine.mean()
    return {"l0": values["l0"], "fvu": values["fvu"], "mcc": float(mcc), "dead": values["dead"]}


def rate(rival: Rival, kind: str, given: Data) -> float:
    """The learning rate: that of ours, or what sparsify/trainer.py derives, as it steps by signs."""
    if rival.name == "eai-sparsify":
        return 5e-3 / (given.shape.d_sae / 2**14) ** 0.5
    option = {"k" if kind in (*BY_K, *OPTION) else "l0": given.shape.k}
    return _config(given, 0, {"kind": kind} | option).lr


def of_rival(rival: Rival, kind: str, lr: float, seed: int, given: Data) -> dict[str, float]:
    """A rival after its last step.

    Raises:
        RivalFailed: it is missing, or does not work.
    """
    shape, n_steps = given.shape, given.n_steps
    ours = _config(given, seed).train
    settings = Settings(
        n_steps,
        given.l1,
        given.l0_price,
        (ours.warmup_steps, n_steps // 20),
        round(ours.decay_fraction * n_steps),
        seed,
    )
    training = rival.step(kind, shape, lr, "cpu", settings)
    assert isinstance(training, Training)
    try:
        for batch in islice(given.source.batches(shape.batch, seed), n_steps):
            training.step(*(batch if isinstance(batch, tuple) else (batch,)))
        assert given.source.truth is not None
        held_out = given.source.held_out("evaluation", N_HELD_OUT)
        first, *_ = held_out.x.split(2)
        training.reconstruct(first)  # what it trained is ready to be read
        return measured(held_out, given.source.truth, training.dictionary().detach(), training.reconstruct)
    except Exception as error:
        raise RivalFailed(f"{rival.name} is left out of {kind}: {first_line(error)}") from error


def of_ours(kind: str, asked: float, seed: int, given: Data) -> tuple[float, dict[str, float]]:
    """Ours with its defaults, asked for this L0; and its learning rate."""
    option = {"k": int(asked)} if kind in BY_K else {OPTION.get(kind, "l0"): asked}
    with tempfile.TemporaryDirectory() as folder:
        config = _config(given, seed, {"kind": kind} | option, f"{folder}/run")
        sae = train(config, given.source, report=False).sae
    assert given.source.truth is not None

    def reconstruct(x: Tensor) -> tuple[SparseCodes, Tensor]:
        codes = sae.encode(x)
        return codes, sae.decode(codes, x)

    held_out = given.source.held_out("evaluation", N_HELD_OUT)
    return config.lr, measured(held_out, given.source.truth, sae.W_dec, reconstruct)


def _config(given: Data, seed: int, sae: dict[str, Any] | None = None, out: str = "runs") -> TrainConfig:
    """All defaults but the sizes, and the least that is measured and written."""
    shape = given.shape
    return TrainConfig.model_validate(
        {
            "sae": {"d_sae": shape.d_sae} | (sae or {"kind": "topk", "k": shape.k}),
            "train": {"n_samples": given.n_steps * shape.batch, "batch_size": shape.batch, "seed": seed},
            "evaluation": {"n_samples": 1000},
            "log": {"every": 1000},
            "checkpoint": {"every_steps": given.n_steps},
            "out": out,
        }
    )


class Comparison:
    """Trials of one set, in a file of JSON lines: what lies there already is not trained again."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.trials = [Trial(**json.loads(line)) for line in lines]
        self.left_out: list[str] = []

    def run(self, kinds: Sequence[str], seeds: Sequence[int]) -> None:
        """Seed by seed, so that what was interrupted can be read."""
        for seed in seeds:
            for kind in kinds:
                given = data(self.name, kind)
                for rival in RIVALS.values():
                    if given is None or not rival.races(kind, "cpu"):
                        continue
                    try:
                        theirs = self._rival(rival, kind, seed, given)
                        self._ours(kind, given.shape.k if kind in BY_K else theirs.l0, seed, given)
                    except RivalFailed as error:
                        tell_once(str(error), self.left_out)

    def pairs(self) -> Iterator[tuple[Trial, Trial]]:
        """Ours beside each trial of a rival."""
        for theirs in self.trials:
            asked = theirs.asked if theirs.kind in BY_K else theirs.l0
            ours = self._find(theirs.kind, OURS, theirs.seed, asked=asked)
            if theirs.name != OURS and ours is not None:
                yield ours, theirs

    def _rival(self, rival: Rival, kind: str, seed: int, given: Data) -> Trial:
        found = self._find(kind, rival.name, seed)
        if found is None:
            lr = rate(rival, kind, given)
            values = of_rival(rival, kind, lr, seed, given)
            found = self._add(Trial(self.name, kind, rival.name, seed, lr, float(given.shape.k), **values))
        return found

    def _ours(self, kind: str, asked: float, seed: int, given: Data) -> None:
        if self._find(kind, OURS, seed, asked=asked) is None:
            lr, values = of_ours(kind, asked, seed, given)
            self._add(Trial(self.name, kind, OURS, seed, lr, asked, **values))

    def _find(self, kind: str, name: str, seed: int, **others: float) -> Trial | None:
        for trial in self.trials:
            if (trial.kind, trial.name, trial.seed) == (kind, name, seed) and others.items() <= asdict(trial).items():
                return trial
        return None

    def _add(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(trial)) + "\n")
        print(f"{trial}", flush=True)
        return trial


def table(comparison: Comparison) -> str:
    """A row for each rival of each kind: means over the seeds of the learning rate that it keeps."""
    rows = [
        "| kind | rival | L0 | FVU | ours: L0, off by | FVU | FVU / theirs | MCC | ours |",
        "|" + "---|" * 9,
    ]
    groups: dict[tuple[str, str], list[tuple[Trial, Trial]]] = {}
    for ours, theirs in comparison.pairs():
        groups.setdefault((theirs.kind, theirs.name), []).append((ours, theirs))
    for (kind, name), found in sorted(groups.items(), key=lambda item: KINDS.index(item[0][0])):
        mine, theirs_all = [ours for ours, _ in found], [theirs for _, theirs in found]
        off = max((one.l0 / one.asked - 1 for one in mine), key=abs)
        ratios = [ours.fvu / theirs.fvu for ours, theirs in found]
        cells = (
            kind,
            name,
            _mean([one.l0 for one in theirs_all], 2),
            _mean([one.fvu for one in theirs_all], 4),
            _mean([one.l0 for one in mine], 2) + ("" if kind in BY_K else f", {off:+.1%}"),
            _mean([one.fvu for one in mine], 4),
            f"{statistics.fmean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            _mean([one.mcc for one in theirs_all], 3),
            _mean([one.mcc for one in mine], 3),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f}"


@dataclass(frozen=True)
class Quality:
    """What SAEs are worth beside those of other libraries, at equal L0."""

    set: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(SETS)}}}")]
    """What to train on."""
    out: Path
    """A file of JSON lines, one for each training; what it holds already is not trained again."""
    kinds: str = ",".join(KINDS)
    """Kinds, with commas between."""
    seeds: int = 3
    """Trained are the seeds from 0 to this."""


def main() -> None:
    """Trains, and prints the table."""
    asked = tyro.cli(Quality)
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    comparison = Comparison(asked.set, asked.out)
    comparison.run(asked.kinds.split(","), range(asked.seeds))
    print(json.dumps(machine("cpu")))
    print(table(comparison))


if __name__ == "__main__":
    main()
