"""Judges of code recovery: the slow, obvious version of every score, scikit-learn, the truth, and luck."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, r2_score, recall_score, roc_auc_score
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics import CodeRecovery, ScoreColumns, feature_table, frequency_deciles, match_dictionary, recovery
from sae.metrics.code_recovery import auroc, best_threshold
from sae.metrics.inputs import packed, permuted, true_codes
from toymodels.features import FeatureBatch, Features
from toymodels.streams import generator

N, N_FEATURES, D, D_SAE = 700, 24, 10, 17
MACRO = ("precision", "recall", "f1", "auroc", "r2", "shrinkage")
SCORES = (*MACRO, "f1_micro", "f1_best", "f1_saelens")


def random_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed, "test"), dtype=torch.float64)


class World:
    """Features of unequal norms and frequencies (one never fires), and a narrower dictionary that is half right."""

    def __init__(self, seed: int = 0) -> None:
        self.truth = random_rows(N_FEATURES, D, seed)
        frequencies = torch.linspace(0.02, 0.3, N_FEATURES).index_fill(0, torch.tensor([4]), 0.0)
        self.acts = Features(N_FEATURES, frequencies).sample(N, generator(seed, "acts"))
        noise = random_rows(D_SAE, D, seed + 1)
        self.W_dec = self.truth[:D_SAE].flip(0) * torch.linspace(0.5, 2, D_SAE)[:, None] + 0.3 * noise
        x = self.acts.embed(self.truth.float()).double()
        self.pre_latents = x @ torch.linalg.pinv(self.W_dec) + 0.1 * random_rows(N, D_SAE, seed + 2)
        self.z = (self.pre_latents - 0.1).relu()
        self.z[:, 3] = 0  # a dead latent


WORLD = World()


def slow_scores(world: World, threshold: float, seed_scores: Tensor | None = None) -> dict[str, float]:
    """Every score as its definition reads, feature by feature, on dense columns."""
    a, truth_norm = world.acts.dense().double(), world.truth.norm(dim=1)
    z = world.z * world.W_dec.norm(dim=1)
    fires, on = (z > threshold).numpy(), (a > 0).numpy()
    alive = torch.from_numpy(fires.any(axis=0))
    matching = match_dictionary(world.W_dec, world.truth, alive)
    scores = z if seed_scores is None else seed_scores
    values: dict[str, list[float]] = {name: [] for name in MACRO}
    tp = fp = fn = 0
    for i, j in enumerate(matching.latent.tolist()):
        predicted = fires[:, j] if j >= 0 else np.zeros(N, dtype=bool)
        tp, fp, fn = tp + (predicted & on[:, i]).sum(), fp + (predicted & ~on[:, i]).sum(), fn + (~predicted & on[:, i]).sum()
        if not on[:, i].any():
            continue
        values["precision"].append(precision_score(on[:, i], predicted, zero_division=0))
        values["recall"].append(recall_score(on[:, i], predicted, zero_division=0))
        values["f1"].append(f1_score(on[:, i], predicted, zero_division=0))
        values["auroc"].append(roc_auc_score(on[:, i], scores[:, j]) if j >= 0 else 0.5)
        if j < 0:
            values["r2"].append(0.0)
            continue
        s = float((a[:, i] * z[:, j]).sum() / z[:, j].square().sum())
        values["r2"].append(r2_score(a[:, i], s * z[:, j]))
        values["shrinkage"].append(np.polyfit(a[:, i] * truth_norm[i], z[:, j], 1)[0])
    cosines = torch.nn.functional.normalize(world.truth) @ torch.nn.functional.normalize(world.W_dec).T
    saelens = [f1_score(on[:, cosines[:, j].abs().argmax()], fires[:, j], zero_division=0) for j in range(D_SAE)]
    return {name: float(np.mean(v)) for name, v in values.items()} | {
        "f1_micro": 2 * tp / (2 * tp + fp + fn),
        "f1_saelens": float(np.mean(saelens)),
        "f1_best": slow_f1_best(z, torch.from_numpy(on), matching.latent, threshold),
    }


def slow_macro_f1(z: Tensor, on: Tensor, latent: Tensor, threshold: float) -> float:
    f1 = [
        f1_score(on[:, i], z[:, j] > threshold, zero_division=0) if j >= 0 else 0.0
        for i, j in enumerate(latent.tolist())
        if on[:, i].any()
    ]
    return float(np.mean(f1))


def slow_f1_best(z: Tensor, on: Tensor, latent: Tensor, floor: float) -> float:
    """The best of all thresholds that occur in every fourth sample, judged on the other samples."""
    validation = torch.arange(len(z)) % 4 == 0
    matched = z[validation][:, latent[latent >= 0]]
    candidates = [floor, *matched[matched > floor].unique().tolist()]
    best = max(candidates[::4], key=lambda t: slow_macro_f1(z[validation], on[validation], latent, t))
    near = [t for t in candidates if abs(t - best) <= 0.15]
    best = max(near, key=lambda t: slow_macro_f1(z[validation], on[validation], latent, t))
    return slow_macro_f1(z[~validation], on[~validation], latent, best)


@pytest.mark.parametrize("with_pre_latents", [False, True])
@pytest.mark.parametrize("layout", ["dense", "padded"])
def test_every_score_equals_its_slow_version(with_pre_latents: bool, layout: str) -> None:
    threshold, pre = 0.05, WORLD.pre_latents if with_pre_latents else None
    codes = WORLD.z if layout == "dense" else packed_anyway(WORLD.z)
    scores = recovery(
        WORLD.W_dec, WORLD.truth, codes=codes, acts=WORLD.acts, pre_latents=pre, firing_threshold=threshold
    )
    slow = slow_scores(WORLD, threshold, pre)
    assert {name: scores[name] for name in slow} == pytest.approx(slow, abs=1e-9)
    assert set(slow) == set(SCORES)
    assert 0.3 < slow["f1"] < 0.9  # a world where the scores have something to say


def packed_anyway(z: Tensor) -> SparseCodes:
    return SparseCodes(z, None, z.shape[1]).compact()
