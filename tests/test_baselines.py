"""Baselines against slow, plain versions of themselves, and through the metrics of SAEs."""

import json
import math
import re
from collections.abc import Iterator

import pytest
import torch
from sklearn.decomposition import FastICA
from torch import Tensor
from torch.nn.functional import normalize

import sae
from sae import HeldOut, TrainConfig, UsageError, baselines
from sae.baselines.beside import budget
from sae.baselines.coding import offset
from sae.baselines.ksvd import learn_ksvd, replace_atoms_, update_atoms_
from sae.baselines.orthogonal_pursuit import SignedCodes, omp
from sae.baselines.semi_nmf import fitted_directions, learn_semi_nmf, updated_codes
from sae.report import write_report
from sae.sources import as_source
from sae.world_source import WorldSource
from toymodels.features import Features
from toymodels.firing import ConstantFiring
from toymodels.streams import generator
from toymodels.synthetic import WorldDescription


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "test", "baselines"), dtype=dtype)


def planted(n: int = 30, d: int = 12, rows: int = 2000, prob: float = 0.06) -> tuple[Tensor, Tensor]:
    """Sparse sums of known directions, and these."""
    D = normalize(normal(n, d), dim=1)
    return Features(n, prob).sample(rows, generator(0, "test")).dense().double() @ D, D


@pytest.fixture(scope="module")
def source() -> WorldSource:
    """A small world with an offset."""
    return WorldSource(
        WorldDescription(n_features=24, d_hidden=10, firing=ConstantFiring(prob=0.06), bias=3.0).build(0)
    )


# Orthogonal matching pursuit


def one_by_one(x: Tensor, D: Tensor, k: int, tolerance: float) -> Tensor:
    """The obvious version: one sample, and a new least-squares problem in each step."""
    support, z = [], torch.zeros(len(D), dtype=x.dtype)
    for _ in range(k):
        correlation = D @ (x - z @ D)
        if correlation.abs().max() <= tolerance * x.norm():
            break
        support.append(int(correlation.abs().argmax()))
        z = torch.zeros_like(z)
        z[support] = torch.linalg.lstsq(D[support].T, x[:, None]).solution[:, 0]
    return z


@pytest.mark.parametrize(("n", "d", "k"), [(40, 12, 5), (7, 9, 7), (1, 3, 1), (33, 4, 4)])
def test_omp_is_that_of_each_sample_alone(n, d, k, monkeypatch):
    monkeypatch.setattr("sae.baselines.orthogonal_pursuit.CHUNK_ENTRIES", 10 * n)  # several chunks, one of them short
    D, x = normalize(normal(n, d, seed=1), dim=1), normal(37, d, seed=2)
    x[3] = 0
    x[4] = 2.5 * D[0]
    z = omp(x, D, k).dense(n)
    torch.testing.assert_close(z, torch.stack([one_by_one(row, D, k, 1e-4) for row in x]), rtol=1e-8, atol=1e-8)
    assert (z != 0).sum(dim=1).max() == k
    assert (z[3] == 0).all()
    assert (z[4] != 0).sum() == 1
    torch.testing.assert_close(omp(x, D, k).decode(D), z @ D)


def test_omp_ends_on_twins_and_keeps_to_its_limits():
    D = normalize(normal(6, 5, seed=1), dim=1)
    D = torch.cat([D, D, -D]).float()
    x = normal(50, 5, seed=2).float()
    codes = omp(x, D, 5)
    assert codes.values.isfinite().all()
    assert ((x - codes.decode(D)).norm(dim=1) < 1e-3 * x.norm(dim=1)).float().mean() > 0.9
    # Atoms that span three dimensions explain what lies in these, and no fourth one is chosen for what rounding left.
    plane = normalize(normal(9, 3, seed=3) @ normal(3, 5, seed=4), dim=1).float()
    codes = omp(x, plane, 5, tolerance=0.0)
    assert codes.values.abs().max() < 100
    assert ((x - codes.decode(plane)) @ plane.T).abs().max() < 1e-4
    assert len(omp(x[:0], D, 2).values) == 0
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must lie in 1\.\.min\(n=18, d=5\), got {k}"):
            omp(x, D, k)


# K-SVD


def test_an_atom_and_its_codes_get_half_a_step_of_the_power_method():
    x, D = normal(60, 6, seed=1), normalize(normal(9, 6, seed=2), dim=1)
    codes = omp(x, D, 3)
    expected_D, z = D.clone(), codes.dense(9)
    for j in range(9):
        rows = z[:, j] != 0
        without = z[rows].clone()
        without[:, j] = 0
        E = x[rows] - without @ expected_D
        expected_D[j] = normalize(E.T @ z[rows, j], dim=0)
        z[rows, j] = E @ expected_D[j]
    residual = x - codes.decode(D)
    before = residual.square().sum()
    update_atoms_(D, codes, residual)
    torch.testing.assert_close(D, expected_D)
    torch.testing.assert_close(codes.dense(9), z)
    torch.testing.assert_close(residual, x - z @ D)
    assert residual.square().sum() < before


def test_useless_atoms_and_twins_give_way_to_the_worst_samples():
    D = normalize(normal(5, 6, seed=1), dim=1)
    D[3] = -D[0]
    atoms = torch.tensor([[0], [0], [0], [0], [0], [1], [1], [1], [1], [2], [2], [2], [3], [3], [3], [3], [4], [4]])
    codes = SignedCodes(atoms, torch.ones(18, 1, dtype=torch.float64))
    codes.values[16:] = 0  # slots that hold nothing
    x, residual = normal(18, 6, seed=3), torch.zeros(18, 6, dtype=torch.float64)
    residual[[5, 7, 2], 0] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    kept = D.clone()
    assert replace_atoms_(D, codes, x, residual) == 3
    torch.testing.assert_close(D[[2, 3, 4]], normalize(x[[5, 7, 2]], dim=1))  # 3 is the twin that is used less
    assert torch.equal(D[:2], kept[:2])
    residual.zero_()
    assert replace_atoms_(D, codes, x, residual) == 0  # nothing is coded badly


def test_ksvd_finds_planted_directions():
    x, truth = planted(40, 20, rows=3000, prob=0.04)
    D = learn_ksvd(x, 40, 3)
    assert ((D @ truth.T).abs().amax(dim=0) > 0.97).double().mean() > 0.8
    assert torch.equal(D, learn_ksvd(x, 40, 3))
    assert not torch.equal(D, learn_ksvd(x, 40, 3, seed=1))
    before, after = ((x - omp(x, W, 3).decode(W)).square().sum() for W in (learn_ksvd(x, 40, 3, n_rounds=1), D))
    assert after < before / 3


# Semi-NMF


def rounds(x: Tensor, F: Tensor, G: Tensor, n: int) -> Iterator[Tensor]:
    """The objective after each half round."""
    for _ in range(n):
        G = updated_codes(x, G, F)
        assert (G >= 0).all()
        yield (x - G @ F).square().sum()
        F = fitted_directions(x, G)
        yield (x - G @ F).square().sum()


@pytest.mark.parametrize("n", [3, 6, 15])
def test_the_objective_of_a_semi_nmf_never_rises(n):
    x = normal(80, 6, seed=1)
    G = normal(80, n, seed=2).abs()
    objective = torch.stack(list(rounds(x, fitted_directions(x, G), G, 40)))
    assert (objective.diff() <= 1e-9 * x.square().sum()).all()
    assert objective[-1] < 0.8 * objective[0]


def test_a_step_of_a_semi_nmf_is_that_of_the_paper():
    x, G, F = normal(20, 5, seed=1), normal(20, 7, seed=2).abs(), normal(7, 5, seed=3)
    plus, minus = (lambda A: (A.abs() + A) / 2), (lambda A: (A.abs() - A) / 2)
    of_x, gram = x @ F.T, F @ F.T
    expected = G * ((plus(of_x) + G @ minus(gram)) / (minus(of_x) + G @ plus(gram))).sqrt()
    torch.testing.assert_close(updated_codes(x, G, F), expected)


def test_a_semi_nmf_of_equal_samples_keeps_its_atoms_apart():
    x, _ = planted(rows=500, prob=0.02)
    assert (x == 0).all(dim=1).sum() > 100  # samples in which no feature is on
    F, G = learn_semi_nmf(x, 30)
    assert (x - G @ F).square().sum() < 0.01 * x.square().sum()
    apart = (F[:, None] - F).norm(dim=2) + torch.eye(30, dtype=F.dtype)
    assert apart.min() > 1e-6
    with pytest.raises(
        UsageError, match="a semi-NMF with 30 atoms needs at least that many samples, got 29; lower d_sae"
    ):
        learn_semi_nmf(x[:29], 30)


# Codes for dictionaries that are given


def test_the_oracle_knows_the_offset(source):
    validation = source.held_out("calibration", 500)
    torch.testing.assert_close(offset(source.truth, validation), source.world.bias, atol=1e-4, rtol=1e-4)
    assert validation.x.mean(dim=0).norm() > 2
    (row,) = baselines.run(["oracle"], source, d_sae=24, k=2, n_fit=500, n_evaluation=1000)
    assert row["recovery/f1"] > 0.95
    assert row["metrics/fvu"] < 0.03


def test_penalty_and_threshold_are_chosen_on_calibration_rows_alone(source):
    given = baselines.prepare(["oracle"], source, d_sae=24, k=2, n_fit=500)
    assert torch.equal(given.validation.x, source.held_out("calibration", len(given.validation.x)).x)
    code = baselines.oracle(source.truth, given.validation).code
    others = HeldOut(*source.held_out("evaluation", 400))
    assert baselines.oracle(source.truth, others).code.threshold != code.threshold


def test_without_true_activations_the_penalty_of_least_error_is_taken(source):
    x = next(source.batches(4000, 0))
    validation = HeldOut(x[:300])
    centre = x.mean(dim=0)
    coder = baselines.sparse_coding(source.truth, source.truth, validation, 3, centre)
    error = (coder.decode(coder.encode(validation.x)) - validation.x).square().sum()
    for penalty in (coder.code.penalty / 3, 3 * coder.code.penalty):
        other = baselines.SparseCoding(source.truth, penalty, 0.0, 3)(validation.x - centre)
        assert error <= 1.02 * (other @ source.truth + centre - validation.x).square().sum()
    with pytest.raises(UsageError, match="without the true activations a penalty can be chosen only at a given k"):
        baselines.sparse_coding(source.truth, None, validation)


def test_pursuit_takes_rows_of_any_size(source):
    x = source.held_out("evaluation", 200).x
    plain, scaled = (baselines.pursuit(f * source.truth, 2, x.mean(dim=0)) for f in (1.0, 7.0))
    torch.testing.assert_close(plain.encode(x).dense(), scaled.encode(x).dense(), rtol=1e-4, atol=1e-5)
    assert plain.encode(x).counts.max() == 2


# Directions without a sign


@pytest.mark.parametrize("name", ["pca", "ica", "ksvd"])
def test_a_direction_without_a_sign_is_two_latents(name, source):
    given = baselines.prepare([name], source, d_sae=24, k=3, n_fit=2000)
    coder = baselines.BASELINES[name](given)
    half = len(coder.W_dec) // 2
    assert half == (24 if name == "ksvd" else 10)
    assert torch.equal(coder.W_dec[:half], -coder.W_dec[half:])
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(2 * half))
    x = source.held_out("evaluation", 300).x
    z = coder.encode(x)
    dense = z.dense()
    assert not ((dense[:, :half] > 0) & (dense[:, half:] > 0)).any()
    error = (coder.decode(z) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert error < (0.2 if name == "ksvd" else 1e-6)


def test_ica_reads_what_scikit_learn_reads(source):
    x = next(source.batches(2000, 0))
    coder = baselines.ica(x, 0)
    theirs = FastICA(whiten="unit-variance", max_iter=500, tol=1e-3, random_state=0).fit_transform(x.numpy())
    z = coder.encode(x).dense()
    ours = z[:, :10] - z[:, 10:]
    torch.testing.assert_close(normalize(ours, dim=0), normalize(torch.from_numpy(theirs), dim=0), atol=1e-4, rtol=1e-3)


def test_ica_that_does_not_converge_says_so(source, caplog, monkeypatch):
    x = next(source.batches(300, 0))
    monkeypatch.setattr("sae.baselines.scikit_learn.ICA_ROUNDS", 1)
    baselines.ica(x, 0)
    assert "ica did not converge in 1 rounds" in caplog.text


# By name, on any source


def test_every_baseline_gets_every_metric_of_an_sae(source, tmp_path):
    config = TrainConfig(
        sae={"kind": "topk", "d_sae": 24, "k": 2},
        train={"n_samples": 64_000, "batch_size": 256},
        evaluation={"n_samples": 2000},
        out=tmp_path / "run",
    )
    trained = sae.train(config, source=source, report=False)
    names = baselines.applicable(source, trained.sae)
    assert names == list(baselines.BASELINES)
    rows = baselines.run(names, source, d_sae=24, k=2, sae=trained.sae, n_fit=2000, n_evaluation=2000)
    by_name = {row["method"]: row for row in rows}
    for name, row in by_name.items():
        assert set(trained.metrics) <= set(row), name
        assert all(math.isfinite(value) for key, value in row.items() if key != "method"), name
    limited = set(names) - {"pca", "ica", "oracle"}
    assert all(by_name[name]["metrics/l0"] <= 2 for name in limited)
    # What each of them has to show.
    mcc = {name: row["recovery/mcc"] for name, row in by_name.items()}
    assert all(mcc[name] == pytest.approx(1, abs=1e-6) for name in ("oracle", "oracle_k", "oracle_pursuit"))
    random = by_name["random"]
    assert abs(mcc["random"] - random["recovery/mcc_chance"]) < 5 * random["recovery/mcc_chance_sd"]
    assert mcc["data_points"] > mcc["random"] + 0.03
    assert min(mcc["ksvd"], mcc["dictionary_learning"]) > mcc["data_points"] + 0.1
    assert mcc["pca"] < mcc["data_points"]
    assert mcc["sae_oracle"] == pytest.approx(trained.metrics["recovery/mcc"], abs=0.1)
    f1 = {name: row["recovery/f1"] for name, row in by_name.items()}
    assert f1["oracle"] > f1["oracle_k"] > f1["random"] + 0.3
    # Chance is that of the number alive.
    assert (
        by_name["pca"]["recovery/mcc_chance"] < random["recovery/mcc_chance"] < by_name["ksvd"]["recovery/mcc_chance"]
    )


def test_baselines_beside_a_run(run_cli, tmp_path):
    config = TrainConfig(
        source={"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 50},
        sae={"kind": "relu", "d_sae": 24},
        train={"n_samples": 6400, "batch_size": 64},
        evaluation={"n_samples": 300},
        out=tmp_path / "run",
    )
    trained = sae.train(config, report=False)
    outcome = run_cli("eval", tmp_path / "run", "--baselines")
    assert outcome.code == 0
    rows = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert [row["method"] for row in rows] == ["relu", *baselines.BASELINES]
    assert rows[0] | trained.metrics == rows[0]
    assert [row["method"] for row in rows if "seconds" not in row] == ["relu"]
    header, own = (next(line for line in outcome.out.splitlines() if name in line) for name in ("fit s", "relu"))
    assert own.split()[-1] == "–"
    assert len(header) < 80
    assert all(row["method"] in outcome.out for row in rows)
    k = min(6, round(trained.metrics["metrics/l0"]))
    assert {row["metrics/l0"] for row in rows if row["method"] == "random"} == {k}
    page = write_report([tmp_path / "run"]).read_text()
    assert "K-SVD" in page
    assert "semi-NMF" in page
    assert "Baselines beside run" in page
    assert "Further baselines" not in page
    table = page.partition("Baselines beside run")[2].partition("</table>")[0]
    assert re.search(r'>seconds to fit</th></tr>.*?scope="row">ReLU</th>.*?<td>–</td></tr>', table, re.DOTALL)
    sae.train(config, overwrite=True, report=False)
    assert not (tmp_path / "run" / "baselines.json").exists()


def test_the_budget_is_the_saes_own_k_or_its_l0():
    def config(**options: object) -> TrainConfig:
        return TrainConfig(sae={"d_sae": 24} | options)

    assert budget(config(kind="topk", k=3), 2.2, 10) == 3
    assert budget(config(kind="batchtopk", k=2.6), 2.2, 10) == 3
    assert budget(config(kind="relu"), 4.4, 10) == 4
    assert budget(config(kind="relu"), 0.2, 10) == 1
    assert budget(config(kind="relu"), 20.0, 10) == 10


def test_a_source_without_truth_has_baselines_too():
    x = planted(rows=3000)[0].float() + 1
    names = baselines.applicable(as_source(x))
    assert not any(name.startswith(("oracle", "sae_")) for name in names)
    rows = baselines.run(names, x, d_sae=30, k=3, n_fit=2000, n_evaluation=500)
    fvu = {row["method"]: row["metrics/fvu"] for row in rows}
    assert fvu["ksvd"] < fvu["data_points"] < fvu["random"]
    assert all("recovery/mcc" not in row for row in rows)


def test_what_cannot_be_fitted_is_told_in_one_line(source):
    x = planted(rows=400)[0].float()
    batches = [normal(3000, 4, seed=seed).float() for seed in range(3)]
    cases = [
        ("unknown baseline 'kvsd'", ["kvsd"], source, {}),
        (r"k must lie in 1\.\.min\(d_sae=8, d_in=10\), got 9", ["pca"], source, {"k": 9}),
        ("the oracle needs the true features", ["oracle_k"], x, {"n_fit": 200}),
        ("sae_oracle and sae_pursuit code the dictionary of a trained SAE; pass sae=", ["sae_oracle"], source, {}),
        ("data_points needs d_sae=500", ["data_points"], source, {"d_sae": 500, "n_fit": 300}),
        ("baselines reconstruct what they read", ["pca"], (x, x), {"n_fit": 200}),
        ("the source ended before the 20000 activations", ["pca"], iter(batches), {}),
    ]
    for message, names, rows, options in cases:
        with pytest.raises(UsageError, match=message) as refused:
            baselines.run(names, rows, **({"d_sae": 8, "k": 2} | options))
        assert "\n" not in str(refused.value)


def test_the_knowledge_of_directions_alone_is_not_enough_for_an_oracle(source):
    with pytest.raises(UsageError, match="needs to know when each true feature is on"):
        baselines.oracle(source.truth, HeldOut(source.held_out("calibration", 50).x))
