"""Transcoders: steps against float64 autograd, units of input and target, saving, what they learn and refuse."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sae
from sae import SAE, HeldOut, SAEConfig, SparseCodes, Sparsifier, TrainConfig, UsageError, run
from sae.config import parse_config
from sae.engine import Engine
from sae.evaluation import evaluate
from sae.kernels import WEIGHTS
from sae.model import load
from sae.optim import BETA1, Now
from sae.sources import as_source
from sae.trainer import Trainer
from toymodels.features import FeatureBatch

BATCH, D_IN, D_OUT, D_SAE = 37, 13, 9, 70
UNIT, TARGET_UNIT, ALPHA, RATE = 1.7, 0.6, 0.5, 0.003
KERNELS = [("native", "fp32"), ("native", "exact"), ("torch", "fp32"), ("reference", "fp32")]
every_kernel = pytest.mark.parametrize(("kernels", "precision"), KERNELS, ids=["-".join(pair) for pair in KERNELS])
both_kinds = pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
SELECTIONS = {
    "topk": {"k": 5},
    "prefixes": {"k": 5, "prefixes": (3, 20, D_SAE)},
    "batchtopk": {"base": {"kind": "batchtopk", "k": 2.3}},
    "relu dense": {"base": {"kind": "relu", "l1_coefficient": 0.3}},
    "relu sparse": {"base": {"kind": "relu", "l1_coefficient": 0.3}},
    "autograd": {"k": 5},
}


class Squared(Sparsifier):
    """z = max(0, pre)^2: nothing that the kernels know."""

    def forward(self, pre_latents: Tensor) -> SparseCodes:
        return SparseCodes(pre_latents.relu().square(), None, pre_latents.shape[1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_sae(kind: str, selection: str, unit_norm: bool = True, d_out: int = D_OUT) -> SAE:
    options = {"kind": kind, "d_sae": D_SAE, "unit_norm_decoder": unit_norm, "aux_coefficient": ALPHA, "aux_k": 3}
    model = SAE(D_IN, SAEConfig.of_kind(options | SELECTIONS[selection]), d_out).double()
    if selection == "autograd":
        model.sparsifier = Squared()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
        model.centre.copy_(normal(D_IN, seed=50))
        model.b_enc -= {"relu dense": 1, "relu sparse": 11}.get(selection, 5)
        if unit_norm:
            model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
    return model


def close(ours: Tensor, theirs: Tensor, tolerance: float, name: str = "") -> None:
    atol = tolerance * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


# The step


class Judge:
    """y_hat = z W_dec + (x - centre) W_skip + b_dec, the loss, autograd, torch's Adam."""

    def __init__(self, model: SAE) -> None:
        self.config, self.sparsifier, self.centre = model.config, model.sparsifier, model.centre.clone()
        names = [*WEIGHTS, *(["W_skip"] if model.W_skip is not None else [])]
        self.weights = {name: getattr(model, name).detach().clone().requires_grad_() for name in names}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=0.0)

    def step(self, activations: Tensor, target: Tensor, now: Now, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoder, W_dec, b_enc, b_dec = (self.weights[name] for name in WEIGHTS)
        x, y = activations / UNIT - self.centre, target
        pre = x @ encoder.T + b_enc
        z = self.sparsifier(pre).dense()
        skipped = x @ self.weights["W_skip"] if "W_skip" in self.weights else 0.0
        readings = [z[:, :n] @ W_dec[:n] + skipped + b_dec for n in self.config.prefixes or (D_SAE,)]
        error = torch.stack([(y - y_hat).square().sum(dim=1).mean() for y_hat in readings]).mean()
        penalty = now.sparsity * self.sparsifier.l1_coefficient * (z * W_dec.norm(dim=1)).sum(dim=1).mean()
        largest = pre[:, dead].topk(3, dim=1)
        sketch = torch.zeros_like(pre[:, dead]).scatter(1, largest.indices, largest.values.relu()) @ W_dec[dead]
        auxiliary = ((y - readings[-1]).detach() - sketch).square().sum(dim=1).mean()
        self.optimizer.zero_grad()
        (error + penalty + ALPHA * auxiliary).backward()
        with torch.no_grad():
            if self.config.unit_norm_decoder:
                W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            self.optimizer.param_groups[0]["lr"] = float(now.rate)
            self.optimizer.step()
            if self.config.unit_norm_decoder:
                W_dec /= W_dec.norm(dim=1, keepdim=True)
        return error.detach(), auxiliary.detach(), penalty.detach()


@every_kernel
@both_kinds
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("d_out", [D_OUT, 21])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_steps_against_autograd(selection, d_out, unit_norm, kind, kernels, precision):
    model, dead = make_sae(kind, selection, unit_norm, d_out), torch.tensor([2, 11, 60, 64, 69])
    engine, judge = Engine(model, kernels, precision), Judge(model)
    engine.dense = selection == "relu dense"
    assert engine.by_autograd == (selection == "autograd") or not engine.dense_products
    for number in range(1, 6):
        x, y = UNIT * normal(BATCH, D_IN, seed=100 + number), normal(BATCH, d_out, seed=200 + number)
        now = Now.at(number, RATE, 0.7)
        terms = engine.step(x, UNIT, now, dead, y)
        for ours, theirs in zip(
            (terms.error, terms.auxiliary, terms.sparsity), judge.step(x, y, now, dead), strict=True
        ):
            torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-10, atol=1e-12)
        if number == 1:
            for name, weight in judge.weights.items():
                first = engine.state.first[name] if name in WEIGHTS else engine.own[name][1]
                close(first / (1 - BETA1), weight.grad, 1e-10, name)
    for name, weight in judge.weights.items():
        close(getattr(model, name).detach(), weight.detach(), 1e-8, name)


def test_a_transcoder_of_its_input_is_the_sae_without_a_tied_bias(tmp_path):
    x = normal(2000, 6).float().abs()
    shared = {"d_sae": 24, "k": 3, "tied_init": False}
    options = {"kind": "topk", "tied_bias": False} | shared
    plain = train(tmp_path / "sae", options, x)
    for name, source in (("alone", x), ("with itself", (x, x.clone()))):
        ours = train(tmp_path / name, {"kind": "transcoder"} | shared, source)
        for key, tensor in plain.sae.state_dict().items():
            assert torch.equal(tensor, ours.sae.state_dict()[key]), key
        assert ours.metrics == plain.metrics


# The units of input and target


def train(out, options: dict, source=None, n_samples: int = 6400, **sections) -> run.Result:
    sections["train"] = {"n_samples": n_samples, "batch_size": 64} | sections.get("train", {})
    given = {"sae": options, "log": {"every": 20}, "out": out} | sections
    return sae.train(TrainConfig.model_validate(given), source, report=False)


def pairs(n: int = 4000, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs, and what a random ReLU layer makes of them, far from the origin and in other units."""
    x = normal(n, D_IN) + 3
    y = (x - 3) @ normal(D_IN, D_OUT, seed=1)
    return x.to(dtype), (y.relu() * 100 - 20).to(dtype)


@both_kinds
@pytest.mark.parametrize("selection", ["topk", "batchtopk", "relu dense"])
def test_the_units_of_the_data_say_what_the_trainers_units_said(kind, selection):
    model, (x, y) = make_sae(kind, selection).requires_grad_(False), pairs(dtype=torch.float64)
    trainer = Trainer(copy.deepcopy(model), TrainConfig(sae=model.config), 2.0, 50.0)
    model.sparsifier.calibrate_(iter([model.pre_latents(x / 2.0)]), len(x))
    final = run.finished(trainer, HeldOut(x, target=y))
    torch.testing.assert_close(final(x), 50 * model(x / 2.0))
    torch.testing.assert_close(final.encode(x).dense(), 50 * model.encode(x / 2.0).dense())
    assert torch.equal(final.W_dec, model.W_dec)
    assert int(final.encode(x).counts.sum()) > len(x)


@both_kinds
def test_training_does_not_depend_on_either_scale(kind, tmp_path):
    x, y = pairs()
    options = {"kind": kind, "d_sae": 24, "k": 3}
    one, other = (train(tmp_path / f"{a}", options, (x * a, y * b)) for a, b in ((1, 1), (1024, 1 / 64)))
    torch.testing.assert_close(other.sae.W_dec, one.sae.W_dec)
    torch.testing.assert_close(other.sae(x * 1024) * 64, one.sae(x))
    assert other.metrics["metrics/fvu"] == pytest.approx(one.metrics["metrics/fvu"], rel=1e-4)
    torch.testing.assert_close(one.sae.b_dec, y.mean(dim=0), rtol=0.5, atol=20)


# Save, load, resume


@both_kinds
@pytest.mark.parametrize("base", ["topk", "batchtopk"])
def test_saved_and_loaded(kind, base, tmp_path):
    (x, y), options = pairs(), {"kind": kind, "d_sae": 24, "base": {"kind": base, "k": 3}}
    result = train(tmp_path / "run", options, (x, y))
    assert (result.sae.d_in, result.sae.d_out, result.sae.W_dec.shape) == (D_IN, D_OUT, (24, D_OUT))
    manifest = json.loads((tmp_path / "run/sae.json").read_text())
    assert (manifest["d_in"], manifest["d_out"], manifest["sae"]["kind"]) == (D_IN, D_OUT, kind)
    loaded = load(tmp_path / "run")
    assert torch.equal(loaded(x), result.sae(x))
    assert (loaded.W_skip is not None) == (kind == "skip_transcoder")
    held = as_source((x, y)).held_out("evaluation", 20_000)
    assert evaluate(loaded, held).metrics == result.metrics
    fvu = sae.metrics.reconstruction.fvu(held.target.double(), loaded(held.x).double())
    assert result.metrics["metrics/fvu"] == pytest.approx(float(fvu), rel=1e-5)


def test_files_from_before_transcoders_load(tmp_path):
    model = SAE(6, SAEConfig.of_kind({"kind": "topk", "d_sae": 8, "k": 2}))
    model.save(tmp_path)
    manifest = json.loads((tmp_path / "sae.json").read_text())
    del manifest["d_out"]
    (tmp_path / "sae.json").write_text(json.dumps(manifest))
    assert load(tmp_path).d_out == 6


@both_kinds
@pytest.mark.parametrize("base", [{"kind": "topk", "k": 3}, {"kind": "relu", "l1_coefficient": 0.1}])
def test_resuming_with_targets_is_bitwise(kind, base, tmp_path, monkeypatch):
    options, sections = {"kind": kind, "d_sae": 24, "base": base}, {"train": {"dead_after_samples": 128}}
    expected = train(tmp_path / "whole", options, pairs(), 1280, **sections)
    original = run.Trainer.step

    def step_until_13(self, x, target):
        if self.n_steps_done == 13:
            raise KeyboardInterrupt
        original(self, x, target)

    monkeypatch.setattr(run.Trainer, "step", step_until_13)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", options, pairs(), 1280, checkpoint={"every_steps": 7}, **sections)
    monkeypatch.setattr(run.Trainer, "step", original)
    config = sae.load_config(tmp_path / "parts/config.yaml")
    resumed = sae.train(config, pairs(), resume=True, report=False)
    for name, tensor in expected.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    assert resumed.metrics == expected.metrics


def test_the_report_of_a_transcoder(tmp_path):
    x, y = pairs()
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    np.save(tmp_path / "truth.npy", np.eye(D_OUT, dtype=np.float32))
    source = {"kind": "array", "path": str(tmp_path / "x.npy"), "target": str(tmp_path / "y.npy")}
    source["truth"] = str(tmp_path / "truth.npy")
    options = {"kind": "skip_transcoder", "d_sae": 24, "k": 3}
    config = {"source": source, "sae": options, "train": {"n_samples": 6400, "batch_size": 64}}
    sae.train(TrainConfig.model_validate(config | {"out": tmp_path / "run"}), report=False)
    metrics = sae.evaluate_run(tmp_path / "run").metrics
    assert 0 < metrics["recovery/mcc"] <= 1, "the truth is that of the target"
    page = run.write_report_if_installed(tmp_path / "run")
    assert "Skip transcoder" in page.read_text()


def test_codes_of_a_skip_transcoder_alone_say_too_little():
    model, x = make_sae("skip_transcoder", "topk"), normal(5, D_IN)
    with pytest.raises(ValueError, match=r"call decode\(codes, x\)"):
        model.decode(model.encode(x))
    torch.testing.assert_close(
        model(x), model.encode(x).dense() @ model.W_dec + (x - model.centre) @ model.W_skip + model.b_dec
    )


def test_scores_of_codes_and_neurons_are_those_of_the_target():
    """A dictionary that is the truth of the target, and codes that are its features, score 1."""
    acts = normal(500, 6).float().relu() * (normal(500, 6, seed=3) > 0.5)
    truth = nn.functional.normalize(normal(6, D_OUT, seed=1).float(), dim=1)
    mixed = 1e9 * acts @ normal(6, D_IN, seed=2).float()  # what fires is measured in the units of the target
    model = SAE(D_IN, SAEConfig.of_kind({"kind": "transcoder", "d_sae": 6, "base": {"kind": "relu"}}), D_OUT)
    with torch.no_grad():
        model.W_dec.copy_(truth)
        model.encoder.copy_(1e-9 * torch.linalg.pinv(normal(6, D_IN, seed=2).float()).T)
        model.b_enc.fill_(-1e-4)
    held_out = HeldOut(mixed, FeatureBatch.from_dense(acts), acts @ truth)
    values = evaluate(model, held_out, truth).metrics
    assert values["metrics/fvu"] < 1e-5
    assert values["recovery/mcc"] > 0.999
    assert values["recovery/f1"] > 0.99


# What they learn

LARGE = {"train": {"batch_size": 256}}


def sparse_layer(n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse inputs in superposition, a random layer's pre-activations, and its output matrix."""
    features = normal(n, 32, seed=seed).abs() * (
        torch.rand(n, 32, generator=torch.Generator().manual_seed(seed)) < 0.06
    )
    x = features @ nn.functional.normalize(normal(32, 16, seed=91), dim=1)
    return x, x @ normal(16, width, seed=92) / 4, normal(width, 12, seed=93) / 4


def test_an_mlp_is_transcoded_better_than_by_random_directions(tmp_path):
    x, pre, out = sparse_layer(20_000, 64)
    source = (x.float(), (pre.relu() @ out).float())
    result = train(tmp_path / "run", {"kind": "transcoder", "d_sae": 64, "k": 4}, source, 128_000, **LARGE)
    held_out = as_source(source).held_out("evaluation", 1000)
    random = SAE(16, result.sae.config, 12)
    random.requires_grad_(False).initialise_(
        source[1].mean(dim=0), torch.Generator().manual_seed(0), source[0].mean(dim=0)
    )
    codes = random.encode(held_out.x).dense()
    # The best that its codes allow: random directions in, and the decoder of least squares.
    design = torch.cat([codes, torch.ones(len(codes), 1)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, held_out.target).solution
    judge = float(sae.metrics.reconstruction.fvu(held_out.target, fitted))
    assert result.metrics["metrics/fvu"] < 0.75 * judge
    assert result.metrics["metrics/l0"] <= 4


def test_a_skip_takes_the_linear_part(tmp_path):
    x, pre, out = sparse_layer(20_000, 64)
    y = nn.functional.leaky_relu(pre, 0.7) @ out
    fvu = {}
    for kind in ("transcoder", "skip_transcoder"):
        options = {"kind": kind, "d_sae": 64, "k": 4}
        result = train(tmp_path / kind, options, (x.float(), y.float()), 128_000, **LARGE)
        fvu[kind] = result.metrics["metrics/fvu"]
    assert fvu["skip_transcoder"] < 0.5 * fvu["transcoder"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs k .* or base .*, got neither"),
        ({"k": 3, "base": {"kind": "relu"}}, "needs k .* or base .*, got both"),
        ({"k": 30}, "k must lie in 1..d_sae=24, got 30"),
        ({"base": {"kind": "topk", "k": 30}}, "k must lie in 1..d_sae=24, got 30"),
        ({"base": {"k": 3}}, "base: needs a kind"),
        ({"base": {"kind": "topc", "k": 3}}, "unknown kind 'topc'; did you mean 'topk'"),
        ({"base": {"kind": "topk", "c": 3}}, "unknown key 'c' for kind 'topk'"),
        ({"base": {"kind": "topk", "k": 3, "d_sae": 9}}, "base accepts only options specific to its kind, got d_sae"),
        ({"base": {"kind": "transcoder", "k": 3}}, "base must be a kind that selects, got 'transcoder'"),
        ({"base": {"kind": "matryoshka", "k": 3}}, "base must be a kind that selects, got 'matryoshka'"),
        ({"base": {"kind": "lista_matryoshka", "k": 3}}, "base must be a kind that selects, got 'lista_matryoshka'"),
        ({"base": {"kind": "refined", "k": 3}}, "base must be a kind that selects, got 'refined'"),
        ({"base": {"kind": "matching_pursuit", "k": 3}}, "base must be a kind that selects, got 'matching_pursuit'"),
        ({"base": {"kind": "topk", "k": 3, "multi_k": 6}, "prefixes": [8, 24]}, "both ask for several reconstructions"),
        ({"k": 3, "tied_bias": True}, "tied_bias must be off"),
    ],
)
@both_kinds
def test_options_that_cannot_be(kind, options, message):
    with pytest.raises(UsageError, match=message):
        parse_config({"sae": {"kind": kind, "d_sae": 24} | options})


def test_the_options_of_a_base_are_written_out():
    config = parse_config({"sae": {"kind": "transcoder", "d_sae": 24, "base": {"kind": "relu"}}})
    assert config.sae.base == {"kind": "relu", "l1_coefficient": 0.1, "l0": None, "weight_by_decoder_norm": True}
    assert parse_config(config.model_dump(mode="json")) == config


def test_targets_that_fit_no_kind(tmp_path):
    x, y = pairs()
    with pytest.raises(UsageError, match="the source has a target, but kind 'topk' reconstructs its input"):
        train(tmp_path / "run", {"kind": "topk", "d_sae": 24, "k": 3}, (x, y))
    with pytest.raises(UsageError, match="the targets have no variance"):
        train(tmp_path / "run", {"kind": "transcoder", "d_sae": 24, "k": 3}, (x, torch.ones(4000, 2)))
    with pytest.raises(UsageError, match="tied_init needs a target as wide as the input, got d_in=13, d_out=9"):
        train(tmp_path / "run", {"kind": "transcoder", "d_sae": 24, "k": 3, "tied_init": True}, (x, y))
    with pytest.raises(UsageError, match="kind 'topk' reconstructs its input: d_out must be 6, got 7"):
        SAE(6, SAEConfig.of_kind({"kind": "topk", "d_sae": 8, "k": 2}), 7)
    assert not (tmp_path / "run").exists()


def test_a_transcoder_without_a_target_says_what_it_does(tmp_path, caplog):
    with caplog.at_level("INFO", "sae"):
        train(tmp_path / "run", {"kind": "transcoder", "d_sae": 24, "k": 3}, pairs()[0])
    assert "the source has no target: the transcoder reconstructs its input" in caplog.text
