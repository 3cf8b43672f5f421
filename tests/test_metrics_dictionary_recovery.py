"""Judges of dictionary recovery: hand-made dictionaries, exhaustive matching, and random dictionaries."""

import inspect
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.metrics import dictionary_chance, dictionary_recovery, match_dictionary, recovery
from toymodels.streams import generator

SCORES = ("mmcs", "mcc", "mcc_saelens", "uniqueness", "uniqueness_saelens", "coverage_0.7", "coverage_0.95")


def random_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed, "test"), dtype=torch.float64)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


TRUTH = unit(random_rows(48, 16))


@pytest.mark.parametrize(
    ("dictionary", "mcc"),
    [
        (TRUTH, 1.0),
        (TRUTH.flip(0), 1.0),
        (3 * TRUTH, 1.0),
        (TRUTH * torch.arange(1, 49)[:, None], 1.0),
        (torch.cat([TRUTH, TRUTH]), 1.0),
        (TRUTH[::2], 0.5),
        (TRUTH[7:8], 1 / 48),
        (TRUTH * (torch.arange(48) % 2)[:, None], 0.5),
    ],
    ids=["truth", "permuted", "tripled", "any norms", "twice", "half", "one latent", "half zero rows"],
)
def test_hand_made_dictionaries_score_what_they_deserve(dictionary: Tensor, mcc: float) -> None:
    scores = dictionary_recovery(dictionary, 2 * TRUTH)
    assert scores["mcc"] == pytest.approx(mcc)
    for threshold in (0.7, 0.8, 0.9, 0.95):
        assert scores[f"coverage_{threshold}"] == pytest.approx(mcc)


def test_sign_flipped_dictionary_scores_chance_and_only_saelens_is_fooled() -> None:
    truth = unit(random_rows(256, 64, seed=3))
    scores = recovery(-truth, truth)
    assert scores["mcc"] == pytest.approx(scores["mcc_chance"], abs=0.02)
    assert scores["coverage_0.7"] == 0
    assert scores["mcc_saelens"] == pytest.approx(1.0)


def test_all_dead_scores_zero() -> None:
    dead = torch.zeros(48, dtype=torch.bool)
    for scores in (dictionary_recovery(TRUTH, TRUTH, dead), dictionary_recovery(0 * TRUTH, TRUTH)):
        assert set(scores.values()) == {0.0}
    assert recovery(TRUTH, TRUTH, alive=dead)["mcc_chance"] == 0


def test_dead_rows_are_dropped_before_matching() -> None:
    alive = torch.arange(48) < 12
    scores = dictionary_recovery(TRUTH, TRUTH, alive)
    assert scores == pytest.approx(
        dictionary_recovery(TRUTH[:12], TRUTH) | {"uniqueness_saelens": 12 / 48, "n_alive": 12.0}
    )
    assert scores["mcc"] == pytest.approx(0.25)
    assert scores["uniqueness"] == 1


def test_zero_rows_match_nothing_even_when_called_alive() -> None:
    half = TRUTH * (torch.arange(48) < 24)[:, None]
    matching = match_dictionary(half, TRUTH, torch.ones(48, dtype=torch.bool))
    assert matching.latent.tolist() == [*range(24), *[-1] * 24]
    assert dictionary_recovery(half, TRUTH, torch.ones(48, dtype=torch.bool))["uniqueness"] == 1


def test_chance_is_computed_at_the_number_alive() -> None:
    alive = torch.arange(48) < 12
    few, all_of_them = recovery(TRUTH, TRUTH, alive=alive), recovery(TRUTH, TRUTH)
    by_hand = dictionary_chance(TRUTH, 12)
    assert few["mcc_chance"] == pytest.approx(sum(draw["mcc"] for draw in by_hand) / len(by_hand))
    assert few["mcc_chance"] < all_of_them["mcc_chance"] / 2


def test_truth_scores_one_and_a_smaller_dictionary_shows_its_limit() -> None:
    scores = recovery(TRUTH, TRUTH)
    for name in (*SCORES, "mcc_adjusted"):
        assert scores[name] == pytest.approx(1.0)
        assert scores[f"{name}_truth"] == pytest.approx(1.0)
    assert recovery(random_rows(12, 16), TRUTH)["mcc_truth"] == pytest.approx(0.25)


@pytest.mark.parametrize("d_sae", [32, 256, 400])
def test_random_dictionary_scores_the_reported_chance(d_sae: int) -> None:
    truth = unit(random_rows(256, 64))
    scores = recovery(random_rows(d_sae, 64, seed=11), truth)
    for name in (*SCORES, "mcc_adjusted"):
        # One draw against the mean of eight: sd * sqrt(1 + 1/8), with an sd estimated from eight draws.
        assert abs(scores[name] - scores[f"{name}_chance"]) <= 5 * scores[f"{name}_chance_sd"] + 1e-12, name
    assert scores["mcc_chance"] > 0.03
    assert scores["mcc_adjusted_chance"] == pytest.approx(0, abs=1e-12)


def test_counts_stand_alone() -> None:
    scores = recovery(TRUTH, TRUTH)
    assert scores["n_alive"] == 48
    assert not {"n_alive_chance", "n_alive_chance_sd", "n_alive_truth"} & set(scores)


def test_chance_draws_are_independent_and_follow_the_seed() -> None:
    one, again, other = (recovery(TRUTH, TRUTH, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one["mcc_chance"] != other["mcc_chance"]
    assert len({draw["mcc"] for draw in dictionary_chance(TRUTH, 48)}) == len(dictionary_chance(TRUTH, 48))


def test_published_chance_of_saelens_mcc() -> None:
    """PITFALLS: a random dictionary scores 0.40 at d = 64, n = 1000."""
    truth = unit(random_rows(1000, 64))
    assert dictionary_recovery(random_rows(1000, 64, seed=1), truth)["mcc_saelens"] == pytest.approx(0.4, abs=0.02)


def slow_mcc(C: Tensor, *, signed: bool = True) -> tuple[float, int]:
    """The best sum over every one-to-one assignment, one by one, and the number of its pairs."""
    C = C if signed else C.abs()
    C = C if C.shape[0] <= C.shape[1] else C.T
    best = max(
        sum(float(C[i, j]) for i, j in enumerate(columns)) for columns in permutations(range(C.shape[1]), len(C))
    )
    return best, len(C)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(n=st.integers(1, 5), d_sae=st.integers(1, 6), d=st.integers(1, 4), seed=st.integers(0, 99))
def test_match_equals_exhaustive_search(n: int, d_sae: int, d: int, seed: int) -> None:
    truth, W_dec = random_rows(n, d, seed), random_rows(d_sae, d, seed + 100)
    C = unit(truth) @ unit(W_dec).T
    scores = dictionary_recovery(W_dec, truth)
    assert scores["mcc"] == pytest.approx(slow_mcc(C)[0] / n)
    total, pairs = slow_mcc(C, signed=False)
    assert scores["mcc_saelens"] == pytest.approx(total / pairs)
    assert scores["mmcs"] == pytest.approx(float(np.mean([max(row) for row in C.tolist()])))
    distinct = len({int(np.argmax(np.abs(column))) for column in C.T.numpy()})
    assert scores["uniqueness"] == pytest.approx(distinct / d_sae)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 999), d_sae=st.integers(1, 30))
def test_scores_ignore_order_and_norms_of_latents(seed: int, d_sae: int) -> None:
    W_dec = random_rows(d_sae, 16, seed)
    alive = torch.rand(d_sae, generator=generator(seed, "alive")) < 0.8
    order = torch.randperm(d_sae, generator=generator(seed, "order"))
    norms = torch.rand(d_sae, 1, generator=generator(seed, "norms"), dtype=torch.float64) + 0.1
    scores = dictionary_recovery(W_dec, TRUTH, alive)
    assert dictionary_recovery((norms * W_dec)[order], TRUTH, alive[order]) == pytest.approx(scores)


def test_match_names_latents_by_their_row_in_W_dec() -> None:
    W_dec = torch.cat([random_rows(3, 16), TRUTH.flip(0)])
    alive = torch.arange(51) >= 5
    matching = match_dictionary(W_dec, TRUTH, alive)
    assert matching.latent.tolist() == [50 - i for i in range(46)] + [-1, -1]
    assert matching.nearest_latent[:46].tolist() == matching.latent[:46].tolist()
    assert matching.best_feature[3:].tolist() == list(reversed(range(48)))
    assert matching.cosine[46:].tolist() == [0, 0]


def test_numpy_and_float32_are_accepted() -> None:
    W_dec = random_rows(40, 16, seed=5)
    scores = dictionary_recovery(W_dec, TRUTH)
    alive = np.ones(40, dtype=bool)
    assert dictionary_recovery(W_dec.numpy()[:, ::1], TRUTH.numpy(), alive) == scores
    parameter = torch.nn.Parameter(W_dec.float())
    assert dictionary_recovery(parameter, TRUTH.float()) == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize(
    ("W_dec", "truth", "alive", "message"),
    [
        (TRUTH[:, :8], TRUTH, None, r"share their columns, got W_dec \[48, 8\] and truth \[48, 16\]"),
        (TRUTH, TRUTH[:0], None, "truth holds no feature"),
        (TRUTH, TRUTH, torch.ones(3, dtype=torch.bool), "each of the 48 latents, got 3"),
        (TRUTH, TRUTH, torch.arange(48), "alive must be boolean, one truth value for each latent, got torch.int64"),
        (TRUTH[0], TRUTH, None, r"W_dec must be a matrix, one direction a row, got \[16\]; pass a 2-d"),
        (TRUTH, TRUTH.tolist(), None, "truth must be a matrix, one direction a row, got list; pass a 2-d"),
        (TRUTH.index_fill(0, torch.tensor(5), torch.nan), TRUTH, None, "row 5 holds nan or inf"),
    ],
)
def test_errors_name_the_value(W_dec: Tensor, truth: Any, alive: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(match_dictionary)(W_dec, truth, alive)  # as users run it, without jaxtyping
