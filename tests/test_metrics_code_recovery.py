"""Judges of code recovery: the slow, obvious version of every score, scikit-learn, the truth, and luck."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, r2_score, recall_score, roc_auc_score
from torch import Tensor

from sae.codes import SparseCodes
from sae.metrics import (
    Ranking,
    dictionary_recovery,
    dimensionality,
    feature_table,
    firing,
    frequency_deciles,
    match_dictionary,
    polysemanticity,
    recovery,
)
from sae.metrics.code_recovery import auroc, code_recovery
from sae.metrics.inputs import compressed, some_rows
from sae.metrics.samples import Samples, Window, columns
from toymodels.features import FeatureBatch, Features
from toymodels.streams import generator
from toymodels.thresholds import threshold_of_highest_f1

N, N_FEATURES, D, D_SAE = 500, 24, 10, 17
MACRO = ("precision", "recall", "f1", "auroc", "r2", "shrinkage")
SCORES = (*MACRO, "f1_micro", "f1_best", "f1_saelens")


def random_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=generator(seed, "test"), dtype=torch.float64)


class World:
    """Features of unequal norms and frequencies (one never fires), a narrower dictionary, and noisy codes."""

    def __init__(self, seed: int = 0) -> None:
        self.truth = random_rows(N_FEATURES, D, seed)
        frequencies = torch.linspace(0.02, 0.3, N_FEATURES).index_fill(0, torch.tensor([4]), 0.0)
        self.acts = Features(N_FEATURES, frequencies).sample(N, generator(seed, "acts"))
        noise = random_rows(D_SAE, D, seed + 1)
        self.W_dec = self.truth[:D_SAE].flip(0) * torch.linspace(0.5, 2, D_SAE)[:, None] + 0.3 * noise
        right = (self.acts.dense().double() * self.truth.norm(dim=1))[:, :D_SAE].flip(1)
        self.pre_latents = (right + 0.3 * random_rows(N, D_SAE, seed + 2)) / self.W_dec.norm(dim=1)
        self.z = (self.pre_latents - 0.1).relu()
        self.z[:, 3] = 0  # a dead latent


WORLD = World()


def slow_scores(world: World, floor: float, scores: Tensor, best: float) -> dict[str, float]:
    """Every score as its definition reads, feature by feature, on dense columns; f1_best at `best`."""
    a, norms = world.acts.dense().double().numpy(), world.truth.norm(dim=1)
    z = (world.z * world.W_dec.norm(dim=1)).numpy()
    fires, on = z > floor, a > 0
    latent = match_dictionary(world.W_dec, world.truth, torch.from_numpy(fires.any(axis=0))).latent.tolist()
    values: dict[str, list[float]] = {name: [] for name in MACRO}
    counts = np.zeros(3)
    for i, j in enumerate(latent):
        guess, true = fires[:, j] if j >= 0 else np.zeros(N, dtype=bool), on[:, i]
        counts += [(guess & true).sum(), (guess & ~true).sum(), (~guess & true).sum()]
        if not true.any():
            continue
        values["precision"].append(precision_score(true, guess, zero_division=0))
        values["recall"].append(recall_score(true, guess, zero_division=0))
        values["f1"].append(f1_score(true, guess, zero_division=0))
        if j < 0:
            values["auroc"].append(0.5)
            values["r2"].append(0.0)
            continue
        shown = np.where(fires[:, j], z[:, j], 0)
        scale = (a[:, i] * shown).sum() / (shown**2).sum()
        values["auroc"].append(roc_auc_score(true, scores[:, j]))
        values["r2"].append(r2_score(a[:, i], scale * shown))
        values["shrinkage"].append(np.polyfit(a[:, i] * float(norms[i]), shown, 1)[0])
    cosines = torch.nn.functional.normalize(world.truth) @ torch.nn.functional.normalize(world.W_dec).T
    closest = cosines.abs().argmax(dim=0).tolist()
    judges = np.arange(N) % 4 != 0
    return {name: float(np.mean(v)) for name, v in values.items()} | {
        "f1_micro": 2 * counts[0] / (2 * counts[0] + counts[1] + counts[2]),
        "f1_saelens": float(np.mean([f1_score(on[:, i], fires[:, j], zero_division=0) for j, i in enumerate(closest)])),
        "f1_best": slow_macro_f1(z[judges], on[judges], latent, best),
    }


def slow_macro_f1(z: np.ndarray, on: np.ndarray, latent: list[int], threshold: float) -> float:
    """Mean F1 over the features that fire, 0 for those without a latent."""
    scores = []
    for i, j in enumerate(latent):
        if on[:, i].any():
            guess = z[:, j] > threshold if j >= 0 else np.zeros(len(z), dtype=bool)
            scores.append(2 * (guess & on[:, i]).sum() / (guess.sum() + on[:, i].sum()))
    return float(np.mean(scores))


def padded(z: Tensor) -> SparseCodes:
    """The padded layout, however many latents fire: each row's values in descending order."""
    return SparseCodes(*z.sort(dim=1, descending=True), z.shape[1])


def run(world: World, codes: Tensor | SparseCodes | None = None, **options: object) -> dict[str, float]:
    """The recovery of a world."""
    codes = world.z if codes is None else codes
    return recovery(world.W_dec, world.truth, codes=codes, acts=world.acts, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_pre_latents", [False, True])
@pytest.mark.parametrize("layout", ["full", "padded"])
def test_every_score_equals_its_slow_version(with_pre_latents: bool, layout: str) -> None:
    floor, pre = 0.05, WORLD.pre_latents if with_pre_latents else None
    codes = WORLD.z if layout == "full" else padded(WORLD.z)
    scores = run(WORLD, codes, pre_latents=pre, firing_threshold=floor)
    slow = slow_scores(WORLD, floor, WORLD.z if pre is None else pre, scores["f1_best_threshold"])
    assert set(slow) == set(SCORES)
    assert {name: scores[name] for name in slow} == pytest.approx(slow, abs=1e-9)
    assert 0.2 < slow["f1"] < 0.9, "the world must leave the scores something to say"


def test_f1_best_takes_the_best_of_all_thresholds_on_every_fourth_sample() -> None:
    scores = run(WORLD, firing_threshold=0.05)
    z, on = (WORLD.z * WORLD.W_dec.norm(dim=1)).numpy()[::4], WORLD.acts.dense().numpy()[::4] > 0
    latent = match_dictionary(WORLD.W_dec, WORLD.truth, WORLD.z.any(dim=0)).latent.tolist()
    candidates = [0.05, *(value for value in np.unique(z) if value > 0.05)]
    best = max(slow_macro_f1(z, on, latent, threshold) for threshold in candidates)
    assert slow_macro_f1(z, on, latent, scores["f1_best_threshold"]) == pytest.approx(best)
    assert best > slow_macro_f1(z, on, latent, 0.05) + 0.01


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 999), n=st.integers(0, 60), columns=st.integers(1, 4))
def test_the_threshold_of_highest_f1_equals_trying_each(seed: int, n: int, columns: int) -> None:
    stream = generator(seed, "threshold")
    on = torch.rand(n, columns, generator=stream) < 0.2
    z = torch.randint(0, 20, (n, columns), generator=stream).double() + 6 * on  # with ties
    row, column = (z > 0).nonzero().unbind(dim=1)
    found = threshold_of_highest_f1(column, z[row, column], on[row, column], on.sum(dim=0).double(), 0.0)

    def total(threshold: float) -> float:
        f1 = [2 * (p & q).sum() / (p.sum() + q.sum()) for p, q in zip((z > threshold).T, on.T, strict=True) if q.any()]
        return float(sum(f1))

    assert total(found) == pytest.approx(max(total(t) for t in range(25)))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 999), n=st.integers(2, 40), levels=st.sampled_from([2, 4, 10**6]))
def test_auroc_equals_sklearn_and_counting_pairs(seed: int, n: int, levels: int) -> None:
    stream = generator(seed, "auroc")
    scores = torch.randint(0, levels, (3, n), generator=stream).double() / levels
    on = torch.rand(3, n, generator=stream) < 0.4
    column, sample = on.nonzero().unbind(dim=1)
    shuffled = torch.randperm(len(column), generator=stream)
    area = auroc(scores.sort(dim=1).values, column[shuffled], scores[column, sample][shuffled])
    for c in range(3):
        if not 0 < on[c].sum() < n:
            assert area[c] == 0.5
            continue
        plus, minus = scores[c][on[c]][:, None], scores[c][~on[c]][None, :]
        pairs = ((plus > minus).double() + (plus == minus).double() / 2).mean()
        assert float(area[c]) == pytest.approx(float(pairs), abs=1e-12)
        assert float(area[c]) == pytest.approx(roc_auc_score(on[c], scores[c]), abs=1e-12)


@pytest.fixture(scope="module")
def truth_world() -> World:
    """A world whose SAE is the truth: rows of any norm, in any order, and codes to match."""
    world = World(seed=5)
    order = torch.randperm(N_FEATURES, generator=generator(0, "order"))
    scale = torch.linspace(0.5, 3, N_FEATURES, dtype=torch.float64)
    world.W_dec = (scale[:, None] * world.truth)[order]
    world.z = (world.acts.dense() / scale)[:, order]
    world.pre_latents = world.z
    return world


def test_truth_scores_one(truth_world: World) -> None:
    scores = run(truth_world)
    for name in set(SCORES) - {"f1_saelens"}:
        assert scores[name] == pytest.approx(1.0, abs=1e-6), name
    # Feature 4 never fires: its latent is dead, and f1_saelens averages dead latents in.
    assert scores["f1_saelens"] == pytest.approx((N_FEATURES - 1) / N_FEATURES)
    assert scores["n_alive"] == N_FEATURES - 1
    for name in SCORES:
        assert scores[f"{name}_truth"] == pytest.approx(scores[name], abs=1e-6), name


def test_truth_value_of_a_smaller_dictionary_is_its_limit() -> None:
    scores = run(WORLD)
    firing = [i for i in range(N_FEATURES) if i != 4]
    assert scores["f1_truth"] == pytest.approx(sum(i < D_SAE for i in firing) / len(firing))
    assert scores["shrinkage_truth"] == pytest.approx(1.0, abs=1e-6)


def test_shuffled_codes_score_the_reported_chance() -> None:
    order = torch.randperm(N, generator=generator(1, "luck"))
    scores, lucky = run(WORLD), run(WORLD, WORLD.z[order])
    for name in SCORES:
        # One draw against the mean of four; the sd of four draws is itself uncertain.
        assert abs(lucky[name] - scores[f"{name}_chance"]) <= 6 * scores[f"{name}_chance_sd"], name
    assert scores["auroc_chance"] == pytest.approx(0.5, abs=0.02)
    assert scores["f1_chance"] < scores["f1"] - 0.1
    assert scores["shrinkage_chance"] == pytest.approx(0.0, abs=0.05)


def test_half_the_truth_scores_half_because_the_missed_count_zero(truth_world: World) -> None:
    kept = torch.arange(N_FEATURES) % 2 == 0
    scores = recovery(
        truth_world.truth[kept],
        truth_world.truth,
        codes=truth_world.acts.dense()[:, kept],
        acts=truth_world.acts,
    )
    firing = torch.arange(N_FEATURES) != 4
    half = float((kept & firing).sum() / firing.sum())
    for name in ("precision", "recall", "f1", "r2", "f1_best"):
        assert scores[name] == pytest.approx(half, abs=1e-6), name
    assert scores["auroc"] == pytest.approx(half + (1 - half) / 2)
    assert scores["shrinkage"] == pytest.approx(1.0, abs=1e-6)


def test_dead_codes_score_zero() -> None:
    scores = run(WORLD, torch.zeros_like(WORLD.z))
    for name in set(SCORES) - {"auroc"}:
        assert scores[name] == 0, name
    assert scores["auroc"] == 0.5
    assert scores["n_alive"] == 0


def test_alive_follows_the_codes_and_the_firing_threshold() -> None:
    assert run(WORLD)["n_alive"] == D_SAE - 1
    assert run(WORLD, alive=torch.arange(D_SAE) < 5)["n_alive"] == 5
    faint = WORLD.z.clone()
    faint[:, 7] = 1e-9
    assert run(WORLD, faint)["n_alive"] == D_SAE - 2
    assert run(WORLD, faint, firing_threshold=0.0)["n_alive"] == D_SAE - 1
    without_acts = recovery(WORLD.W_dec, WORLD.truth, codes=faint)
    assert without_acts["n_alive"] == D_SAE - 2
    assert "f1" not in without_acts


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_ignore_order_and_norms_of_latents(seed: int) -> None:
    order = torch.randperm(D_SAE, generator=generator(seed, "order"))
    norms = torch.rand(D_SAE, generator=generator(seed, "norms"), dtype=torch.float64) + 0.1
    options = {"pre_latents": WORLD.pre_latents, "firing_threshold": 0.05}
    scores = run(WORLD, **options)
    options = {"pre_latents": WORLD.pre_latents[:, order], "firing_threshold": 0.05}
    moved = recovery(
        (norms[:, None] * WORLD.W_dec)[order],
        WORLD.truth,
        codes=(WORLD.z / norms)[:, order],
        acts=WORLD.acts,
        **options,
    )
    assert moved == pytest.approx(scores, abs=1e-9)


def test_larger_features_with_smaller_activations_are_the_same_inputs() -> None:
    scores = run(WORLD, firing_threshold=0.05)
    moved = recovery(WORLD.W_dec, 3 * WORLD.truth, codes=WORLD.z, acts=WORLD.acts.dense() / 3, firing_threshold=0.05)
    assert {name: moved[name] for name in SCORES} == pytest.approx({name: scores[name] for name in SCORES}, abs=1e-6)


@pytest.mark.parametrize("layout", ["full", "padded"])
def test_scores_do_not_depend_on_the_batch_size(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = WORLD.z if layout == "full" else padded(WORLD.z)
    options = {"pre_latents": WORLD.pre_latents, "firing_threshold": 0.05}
    scores = run(WORLD, codes, **options)
    monkeypatch.setattr("sae.metrics.inputs.SAMPLES_AT_ONCE", 137)
    monkeypatch.setattr("sae.metrics.native.TABLE_ENTRIES", 100)
    monkeypatch.setattr("sae.metrics.ranking.SORTED_ENTRIES", 1200)
    assert run(WORLD, codes, **options) == pytest.approx(scores, abs=1e-9)


def test_scores_do_not_depend_on_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"pre_latents": WORLD.pre_latents, "firing_threshold": 0.05}
    scores = run(WORLD, **options)
    monkeypatch.setattr("sae.metrics.samples.MAX_WINDOW_ROWS", 83)
    monkeypatch.setattr("sae.metrics.samples.MIN_WINDOW_ROWS", 83)
    monkeypatch.setattr("sae.metrics.samples.MEMORY_BYTES", 2**10)
    windowed = run(WORLD, **options)
    chance = [name for name in SCORES if windowed[f"{name}_chance"] != scores[f"{name}_chance"]]
    assert set(chance) == set(SCORES) - {"auroc"}, "shuffles within windows of 83 rows are other shuffles"
    for name in SCORES:
        assert windowed[name] == pytest.approx(scores[name], abs=1e-9)
        assert windowed[f"{name}_truth"] == pytest.approx(scores[f"{name}_truth"], abs=1e-9)
        spread = scores[f"{name}_chance_sd"] + windowed[f"{name}_chance_sd"]
        assert abs(windowed[f"{name}_chance"] - scores[f"{name}_chance"]) <= 4 * spread, name


def test_streaming_by_hand_equals_recovery() -> None:
    scores = run(WORLD, firing_threshold=0.05)
    matching = match_dictionary(WORLD.W_dec, WORLD.truth, WORLD.z.any(dim=0))
    ranking, windows = Ranking(matching, N), []
    for start, stop in pairwise([0, 1, 5, 300, 301, N]):
        ranking.update(WORLD.z[start:stop], WORLD.acts[start:stop])
        z = padded(WORLD.z * WORLD.W_dec.norm(dim=1))[start:stop]
        windows.append(Window(start, compressed(z, 0.05), WORLD.acts[start:stop]))
    (seen,) = code_recovery([lambda: windows], matching, WORLD.truth, 0.05)
    streamed = seen.compute(ranking.areas(N_FEATURES, 0, 0)[0])
    assert streamed == pytest.approx({name: scores[name] for name in streamed}, abs=1e-9)


def test_auroc_of_very_many_samples_looks_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.metrics.ranking.KEPT_ENTRIES", 200 * (D_SAE - 1))
    scores = run(WORLD, pre_latents=WORLD.pre_latents, firing_threshold=0.05)
    matching = match_dictionary(WORLD.W_dec, WORLD.truth, WORLD.z.any(dim=0))
    ranking = Ranking(matching, 200)
    ranking.update(WORLD.pre_latents, WORLD.acts)
    on = (WORLD.acts.dense() > 0).any(dim=0)
    assert scores["auroc"] == pytest.approx(float(ranking.areas(N_FEATURES, 0, 0)[0][on].mean()))


def test_shuffles_follow_the_seed() -> None:
    one, again, other = (run(WORLD, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one["f1"] == other["f1"]
    assert one["f1_chance"] != other["f1_chance"]


def test_permuting_and_repacking_keep_every_entry() -> None:
    dense = WORLD.acts.dense()
    order = torch.randperm(N, generator=generator(2, "order"))
    assert some_rows(WORLD.acts, order).dense().equal(dense[order])
    assert columns(WORLD.acts, 3, 9).dense().equal(dense[:, 3:9])
    assert columns(WORLD.acts, 0, 99) is WORLD.acts
    for codes in (SparseCodes(WORLD.z, None, D_SAE), padded(WORLD.z)):
        parts = [compressed(codes[:7], 0.1), compressed(codes[7:], 0.1)]
        assert FeatureBatch.cat(parts).dense().equal(WORLD.z * (WORLD.z > 0.1))


def test_samples_come_back_as_they_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.metrics.samples.MEMORY_BYTES", 2**10)
    codes = compressed(SparseCodes(WORLD.z, None, D_SAE), 0.0)
    with Samples(D_SAE, N_FEATURES) as samples:
        for rows in (slice(0, 300), slice(300, N)):
            samples.append(codes[rows], WORLD.acts[rows])
        for draw in (None, 0, 1):
            windows = list(samples.windows(draw))
            assert [window.start for window in windows] == [0, 300]
            assert torch.cat([window.codes.dense() for window in windows]).equal(WORLD.z)
            views = [w.acts if w.order is None else some_rows(w.acts, w.order) for w in windows]
            acts = torch.cat([view.dense() for view in views])
            assert acts.equal(WORLD.acts.dense()) == (draw is None)
            assert acts[:300].sum(dim=0).allclose(WORLD.acts[:300].dense().sum(dim=0)), "shuffled within a window"


def test_feature_table_says_what_became_of_each_feature() -> None:
    table = feature_table(WORLD.W_dec, WORLD.truth, WORLD.z, WORLD.acts, firing_threshold=0.05)
    assert {column.shape for column in table.values()} == {(N_FEATURES,)}
    dense, norms = WORLD.acts.dense().double(), WORLD.truth.norm(dim=1)
    assert table["frequency"].tolist() == pytest.approx((dense > 0).double().mean(dim=0).tolist())
    assert float(table["magnitude"][7]) == pytest.approx(float(dense[:, 7][dense[:, 7] > 0].mean() * norms[7]))
    assert table["magnitude"][4] == 0
    cosines = torch.nn.functional.normalize(WORLD.truth) @ torch.nn.functional.normalize(WORLD.W_dec).T
    for i in range(N_FEATURES):
        if (j := int(table["latent"][i])) >= 0:
            assert float(table["cosine"][i]) == pytest.approx(float(cosines[i, j]))
        assert bool(table["found"][i]) == (float(table["cosine"][i]) > 0.9)
    alive = cosines.index_fill(1, torch.tensor([3]), -2.0)
    assert table["nearest_latent"].equal(alive.argmax(dim=1))
    gram = torch.nn.functional.normalize(WORLD.truth) @ torch.nn.functional.normalize(WORLD.truth).T
    others = gram.fill_diagonal_(-2)
    assert table["nearest_feature"].equal(others.argmax(dim=1))
    assert table["nearest_feature_cosine"].tolist() == pytest.approx(others.amax(dim=1).tolist())
    scores = run(WORLD, firing_threshold=0.05)
    firing = table["frequency"] > 0
    for name in ("precision", "recall", "f1", "auroc", "r2"):
        assert float(table[name][firing].mean()) == pytest.approx(scores[name])


def test_a_feature_is_found_by_its_own_latent_only() -> None:
    """The second feature is close to the one latent, which belongs to the first."""
    truth = torch.tensor([[1.0, 0.0], [0.98, 0.2]])
    acts = FeatureBatch.from_dense(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    table = feature_table(truth[:1], truth, acts.dense()[:, :1], acts)
    assert table["found"].tolist() == [True, False]
    assert table["latent"].tolist() == [0, -1]
    assert table["nearest_latent"].tolist() == [0, 0]
    assert (table["nearest_latent_cosine"] > 0.9).all()


def test_a_latent_fires_by_what_it_adds_to_the_reconstruction() -> None:
    """z_j |w_j| counts, not z_j: large codes of tiny rows are silent, tiny codes of large rows fire."""
    W_dec = torch.tensor([[1e-9, 0.0], [0.0, 1e9], [1.0, 1.0]])
    codes = torch.tensor([[1.0, 1e-9, 1.0], [1.0, 1e-9, 0.0]])
    assert firing(W_dec, codes, 1e-6).tolist() == [False, True, True]


def test_a_single_feature_has_no_neighbour() -> None:
    acts = FeatureBatch.from_dense(torch.tensor([[1.0], [0.0]]))
    table = feature_table(torch.eye(2)[:1], torch.eye(2)[:1], acts.dense(), acts)
    assert table["nearest_feature"].tolist() == [-1]
    assert table["nearest_feature_cosine"].tolist() == [0]


def test_deciles_split_the_table_by_frequency() -> None:
    table = feature_table(WORLD.W_dec, WORLD.truth, WORLD.z, WORLD.acts, firing_threshold=0.05)
    deciles = frequency_deciles(table)
    assert deciles["n_features"].tolist() == [3, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    assert deciles["frequency"].equal(deciles["frequency"].sort().values)
    rare = table["frequency"].argsort(stable=True)[:3]
    assert 4 in rare.tolist()
    assert float(deciles["mcc"][0]) == pytest.approx(float(table["cosine"][rare].mean()))
    assert float(deciles["coverage_0.7"][0]) == pytest.approx(float((table["cosine"][rare] > 0.7).double().mean()))
    firing = rare[table["frequency"][rare] > 0]
    assert float(deciles["f1"][0]) == pytest.approx(float(table["f1"][firing].mean()))
    weights = deciles["n_features"] / N_FEATURES
    assert float((deciles["mmcs"] * weights).sum()) == pytest.approx(run(WORLD, firing_threshold=0.05)["mmcs"])


@pytest.mark.parametrize(
    ("codes", "acts", "message"),
    [
        (None, WORLD.acts, "acts were given without codes"),
        (WORLD.z[:, :5], WORLD.acts, "codes of 5 latents do not fit a W_dec of 17 rows"),
        (WORLD.z[:9], WORLD.acts, "codes of 9 samples do not fit acts of 500"),
        (WORLD.z[:0], WORLD.acts[:0], "codes hold no sample"),
        (
            WORLD.z,
            FeatureBatch.from_dense(torch.ones(2, 250, N_FEATURES)),
            r"must be \[samples, n_features\]",
        ),
        (WORLD.z, WORLD.acts.dense()[:, :6], "true activations of 6 features do not fit a truth of 24"),
    ],
)
def test_errors_name_the_value(codes: Tensor | None, acts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recovery(WORLD.W_dec, WORLD.truth, codes=codes, acts=acts, firing_threshold=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_whole_numbers_count_as_what_they_are(dtype: torch.dtype) -> None:
    whole = (WORLD.acts.dense() * 4).round()
    expected = recovery(WORLD.truth, WORLD.truth, codes=whole, acts=whole)
    assert expected["f1"] == 1
    for codes, acts in ((whole.to(dtype), whole), (whole, whole.to(dtype)), (whole.to(dtype).numpy(), whole.numpy())):
        assert recovery(WORLD.truth, WORLD.truth, codes=codes, acts=acts) == pytest.approx(expected, abs=1e-6)
    assert polysemanticity(whole.to(dtype), whole.to(dtype)) == pytest.approx(polysemanticity(whole, whole), abs=1e-6)
    rows = torch.eye(4, 6, dtype=dtype)
    assert dimensionality(rows) == dimensionality(rows.double())
    assert dictionary_recovery(rows, rows)["mcc"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    codes, acts, scores = WORLD.z.clone(), WORLD.acts.dense(), WORLD.z.clone()
    codes[7, 3] = acts[9, 2] = scores[11, 1] = bad
    known = {"codes": WORLD.z, "acts": WORLD.acts}
    for words, message in (
        (known | {"codes": codes}, "codes must be finite, those of sample 7 hold nan or inf"),
        (known | {"acts": acts}, "true activations must be finite, sample 9 holds nan or inf"),
        (known | {"pre_latents": scores}, "pre-latents must be finite, those of sample 11"),
        (known | {"pre_latents": scores[:, 1:]}, "pre-latents of .* do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            recovery(WORLD.W_dec, WORLD.truth, **words)  # type: ignore[arg-type]
