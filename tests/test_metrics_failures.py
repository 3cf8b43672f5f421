"""Judges of splitting, absorption and hedging: dictionaries that were made to fail, beside the truth."""

import pytest
import torch
from torch import Tensor

from sae import HeldOut
from sae.codes import SparseCodes
from sae.evaluation import evaluate
from sae.metrics import match_dictionary, recovery
from sae.metrics.dictionary_recovery import splitting
from toymodels.features import FeatureBatch
from toymodels.streams import generator

N, D = 4000, 12
TRUTH = torch.eye(D)


def family_acts(n: int = N) -> Tensor:
    """Feature 1 fires only where feature 0 does; 2 and 3 mostly together; the rest alone."""
    u = torch.rand(n, D, generator=generator(0, "family"))
    on = u < 0.1
    on[:, 0] = u[:, 0] < 0.4
    on[:, 1] = on[:, 0] & (u[:, 1] < 0.3)
    on[:, 3] = torch.where(u[:, 4] < 0.8, on[:, 2], u[:, 3] < 0.1)
    return on * (0.5 + torch.rand(n, D, generator=generator(0, "strength")))


class Coder:
    """A dictionary with codes of its own making."""

    def __init__(self, W_dec: Tensor, codes: Tensor) -> None:
        self.W_dec, self.codes, self.at = W_dec, codes, 0

    def encode(self, x: Tensor) -> SparseCodes:
        z = self.codes[self.at : self.at + len(x)]
        self.at += len(x)
        return SparseCodes(z, None, len(self.W_dec))

    def decode(self, codes: SparseCodes, x: Tensor) -> Tensor:
        return codes.decode(self.W_dec)

    def pre_latents(self, x: Tensor) -> Tensor:
        return x @ self.W_dec.T


ACTS = family_acts()
HELD_OUT = HeldOut(ACTS @ TRUTH, FeatureBatch.from_dense(ACTS))


def measure(W_dec: Tensor, codes: Tensor) -> dict[str, float]:
    values = evaluate(Coder(W_dec, codes), HELD_OUT, TRUTH).metrics
    return {key.removeprefix("recovery/"): value for key, value in values.items() if key.startswith("recovery/")}


def test_the_truth_neither_absorbs_nor_hedges_nor_splits() -> None:
    order = torch.randperm(D, generator=generator(0, "order"))
    scores = measure(TRUTH[order], ACTS[:, order])
    assert scores["absorption_pairs"] == 1
    for name in ("absorption", "hedging", "splitting"):
        assert scores[name] == pytest.approx(0, abs=1e-9)
        assert scores[f"{name}_truth"] == 0
    # 0 and 1, 2 and 3, in both orders.
    assert scores["hedging_pairs"] == 4


def test_a_child_that_fires_for_its_parent_absorbs_it() -> None:
    """Latent 1 stands for parent and child, latent 0 is silent where it fires: all of the child's samples are lost."""
    W_dec, codes = TRUTH.clone(), ACTS.clone()
    W_dec[1] = torch.nn.functional.normalize(TRUTH[0] + TRUTH[1], dim=0)
    codes[:, 0] *= ACTS[:, 1] == 0
    scores = measure(W_dec, codes)
    assert scores["absorption"] == pytest.approx(1.0)
    assert abs(scores["absorption_chance"]) < 0.1
    half = ACTS.clone()
    half[:, 0] *= (ACTS[:, 1] == 0) | (torch.arange(N) % 2 == 0)
    assert measure(W_dec, half)["absorption"] == pytest.approx(0.5, abs=0.06)
    # A silent parent alone is no absorption: nobody took its place.
    assert measure(TRUTH, codes)["absorption"] == 0


def test_absorption_counts_what_is_more_than_with_the_child_off() -> None:
    W_dec, codes = TRUTH.clone(), ACTS.clone()
    W_dec[1] = torch.nn.functional.normalize(TRUTH[0] + TRUTH[1], dim=0)
    codes[:, 0] = 0.0
    codes[0, 0] = 1.0  # alive
    codes[:, 1] = ACTS[:, 0]  # fires for the parent, whatever the child does
    assert measure(W_dec, codes)["absorption"] == pytest.approx(0.0, abs=1e-2)


def test_latents_that_lean_towards_what_fires_with_them_hedge() -> None:
    lean = 0.3
    W_dec = TRUTH.clone()
    W_dec[2] += lean * TRUTH[3]
    W_dec[3] += lean * TRUTH[2]
    scores = measure(W_dec, ACTS)
    # Two of the four ordered pairs lean, by the sine of their angle.
    assert scores["hedging"] == pytest.approx(0.5 * lean / (1 + lean**2) ** 0.5, abs=1e-6)
    W_dec[2:4] = TRUTH[2:4] - lean * TRUTH[[3, 2]]
    assert measure(W_dec, ACTS)["hedging"] == pytest.approx(-0.5 * lean / (1 + lean**2) ** 0.5, abs=1e-6)


def test_independent_features_have_neither_families_nor_correlations() -> None:
    on = torch.rand(N, D, generator=generator(1, "alone")) < 0.1
    acts = FeatureBatch.from_dense(on.float())
    values = evaluate(Coder(TRUTH, on.float()), HeldOut(on.float() @ TRUTH, acts), TRUTH).metrics
    assert values["recovery/absorption_pairs"] == values["recovery/hedging_pairs"] == 0
    assert not {"recovery/absorption", "recovery/hedging"} & values.keys()


def test_splitting_counts_latents_beyond_the_first() -> None:
    assert splitting(match_dictionary(TRUTH.repeat(3, 1), TRUTH)) == 2
    assert splitting(match_dictionary(torch.cat([TRUTH, TRUTH[:3]]), TRUTH)) == 3 / D
    assert splitting(match_dictionary(TRUTH[:3], TRUTH)) == 0
    assert splitting(match_dictionary(TRUTH.repeat(3, 1), TRUTH, torch.arange(3 * D) < D)) == 0


HAND_MADE = {
    "permuted": (TRUTH.flip(0), 1.0),
    "tripled": (TRUTH.repeat(3, 1), 1.0),
    "half": (TRUTH[: D // 2], 0.5),
    "one latent": (TRUTH[3:4], 1 / D),
    "all dead": (0 * TRUTH, 0.0),
}


@pytest.mark.parametrize(("W_dec", "mcc"), HAND_MADE.values(), ids=HAND_MADE)
def test_hand_made_dictionaries_get_what_they_deserve(W_dec: Tensor, mcc: float) -> None:
    scores = recovery(W_dec, TRUTH, codes=(ACTS @ W_dec.T), acts=HELD_OUT.acts)
    assert scores["mcc"] == pytest.approx(mcc)
    assert scores["f1"] == pytest.approx(mcc, abs=1e-6)


def test_flipped_and_random_dictionaries_score_chance() -> None:
    truth = torch.nn.functional.normalize(torch.randn(200, 32, generator=generator(2, "truth")))
    for W_dec in (-truth, torch.randn(200, 32, generator=generator(3, "random"))):
        scores = recovery(W_dec, truth)
        assert scores["mcc"] == pytest.approx(scores["mcc_chance"], abs=0.02)
        assert scores["mcc_adjusted"] == pytest.approx(0, abs=0.04)
