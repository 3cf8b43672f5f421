"""SAEs of other libraries. Each library's formulas are written out here once more, from its files: they judge what we
write and what we read. With the libraries installed, they judge it themselves."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sae
from sae import SAE, UsageError, formats
from sae.config import SAEConfig
from sae.formats.portable import portable

D, F, B = 7, 30, 50
SEED = 0


def normal(*shape: int, scale: float = 0.5, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + len(shape) + sum(shape)))


X = normal(B, D, scale=1.0)


def made(options: dict, d_out: int = D) -> SAE:
    """An SAE with nothing at 0, ready for inference."""
    config = SAEConfig.of_kind({"d_sae": F} | options)
    model = SAE(D, config, d_out).eval().requires_grad_(False)
    stream = torch.Generator().manual_seed(SEED)
    for tensor in (*model.parameters(), *([] if model.centre is None else [model.centre])):
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=stream))
    if model.sparsifier.pursuit_steps:
        model.W_dec.div_(model.W_dec.norm(dim=1, keepdim=True))
        model.b_enc.zero_()
    threshold = getattr(model.sparsifier, "threshold", None)
    if threshold is not None:
        threshold.copy_(0.1 + 0.5 * torch.rand(threshold.shape, generator=stream))
    return model


# What each library computes, from its files


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre.relu() * (pre > threshold)


def top(pre: Tensor, k: int) -> Tensor:
    values, latents = pre.relu().topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, latents, values)


def pursued(x: Tensor, W_dec: Tensor, k: int) -> Tensor:
    z, left = torch.zeros(len(x), len(W_dec)), x.clone()
    for _ in range(k):
        along = left @ W_dec.T
        best = along.argmax(dim=1)
        value = along.max(dim=1).values.relu()
        z[torch.arange(len(x)), best] += value
        left -= value[:, None] * W_dec[best]
    return z


def by_saelens(folder: Path) -> tuple[Tensor, Tensor]:
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert (cfg["d_in"], cfg["dtype"], cfg["normalize_activations"]) == (D, "float32", "none")
    name = cfg["architecture"]
    assert not (name.endswith("transcoder") and cfg["apply_b_dec_to_input"])
    inside = X - t["b_dec"] if cfg["apply_b_dec_to_input"] else X
    if name == "matching_pursuit":
        z = pursued(inside, t["W_dec"], cfg["max_iterations"])
    elif name == "gated":
        pre = inside @ t["W_enc"]
        z = (pre * t["r_mag"].exp() + t["b_mag"]).relu() * (pre + t["b_gate"] > 0)
    else:
        pre = inside @ t["W_enc"] + t["b_enc"]
        if cfg.get("rescale_acts_by_decoder_norm"):
            pre = pre * t["W_dec"].norm(dim=1)
        z = top(pre, cfg["k"]) if name == "topk" else jump(pre, t.get("threshold", 0.0))
    W_dec = t["W_dec"]
    if cfg.get("rescale_acts_by_decoder_norm"):
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    x_hat = z @ W_dec + t["b_dec"]
    return z, x_hat + X @ t["W_skip"].T if "W_skip" in t else x_hat


def by_dictionary_learning(folder: Path) -> tuple[Tensor, Tensor]:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    name, t = trainer["dict_class"], torch.load(folder / "ae.pt", weights_only=True)
    W_enc, W_dec = (t[k] if k in t else t[w].T for k, w in (("W_enc", "encoder.weight"), ("W_dec", "decoder.weight")))
    b_dec = next(t[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in t)
    inside = X if name in ("JumpReluAutoEncoder", "AutoEncoderNew") else X - b_dec
    if name == "GatedAutoEncoder":
        pre = inside @ W_enc
        z = (pre + t["gate_bias"] > 0) * (t["r_mag"].exp() * pre + t["mag_bias"]).relu()
    else:
        pre = inside @ W_enc + (t["b_enc"] if "b_enc" in t else t["encoder.bias"])
        z = top(pre, int(t["k"])) if name == "AutoEncoderTopK" else jump(pre, t.get("threshold", 0.0))
    return z, z @ W_dec + b_dec


def by_sparsify(folder: Path) -> tuple[Tensor, Tensor]:
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    assert (cfg["d_in"], cfg["num_latents"], cfg["activation"]) == (D, F, "topk")
    inside = X if cfg["transcode"] else X - t["b_dec"]
    z = top(inside @ t["encoder.weight"].T + t["encoder.bias"], cfg["k"])
    x_hat = z @ t["W_dec"] + t["b_dec"]
    return z, x_hat + X @ t["W_skip"].T if cfg["skip_connection"] else x_hat


JUDGES = {"saelens": by_saelens, "dictionary_learning": by_dictionary_learning, "sparsify": by_sparsify}


def same(ours: SAE, theirs: tuple[Tensor, Tensor]) -> None:
    codes = ours.encode(X)
    torch.testing.assert_close(codes.dense(), theirs[0], rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(ours.decode(codes, X), theirs[1], rtol=1e-5, atol=1e-5)


# What we write

# Options, and what each library calls it; None: it has no such thing.
WRITTEN = {
    "relu": ({"kind": "relu"}, "standard", "AutoEncoder", None),
    "relu with a threshold": ({"kind": "relu", "l0": 3.0}, "jumprelu", "JumpReluAutoEncoder", None),
    "relu of its own centre": ({"kind": "relu", "tied_bias": False}, "standard", "AutoEncoder", None),
    "topk": ({"kind": "topk", "k": 3}, "topk", "AutoEncoderTopK", "sae"),
    "multi_k": ({"kind": "topk", "k": 3, "multi_k": 9}, "topk", "AutoEncoderTopK", "sae"),
    "topk of its own centre": ({"kind": "topk", "k": 3, "tied_bias": False}, "topk", "AutoEncoderTopK", "sae"),
    "batchtopk": ({"kind": "batchtopk", "k": 3}, "jumprelu", "BatchTopKSAE", None),
    "a fraction of k": ({"kind": "batchtopk", "k": 2.5}, "jumprelu", "JumpReluAutoEncoder", None),
    "matryoshka": ({"kind": "matryoshka", "k": 3}, "jumprelu", "BatchTopKSAE", None),
    "jumprelu": ({"kind": "jumprelu", "l0": 3.0}, "jumprelu", "JumpReluAutoEncoder", None),
    "gated": ({"kind": "gated"}, "gated", "GatedAutoEncoder", None),
    "gated with a threshold": ({"kind": "gated", "l0": 3.0}, "gated", "GatedAutoEncoder", None),
    "gated, tied": ({"kind": "gated", "tied_bias": True}, "gated", "GatedAutoEncoder", None),
    "p_annealing": ({"kind": "p_annealing", "l0": 3.0}, "jumprelu", "JumpReluAutoEncoder", None),
    "matching_pursuit": ({"kind": "matching_pursuit", "k": 3}, "matching_pursuit", None, None),
    "untied matching_pursuit": ({"kind": "matching_pursuit", "k": 3, "tied_bias": False}, None, None, None),
    "transcoder": ({"kind": "transcoder", "base": {"kind": "relu"}}, "transcoder", None, None),
    "topk transcoder": ({"kind": "transcoder", "k": 3}, None, None, "sae"),
    "jumprelu transcoder": (
        {"kind": "transcoder", "base": {"kind": "jumprelu", "l0": 3.0}},
        "jumprelu_transcoder",
        None,
        None,
    ),
    "skip_transcoder": ({"kind": "skip_transcoder", "base": {"kind": "relu"}}, "skip_transcoder", None, None),
    "batchtopk skip_transcoder": (
        {"kind": "skip_transcoder", "base": {"kind": "batchtopk", "k": 3}},
        "jumprelu_skip_transcoder",
        None,
        None,
    ),
    "topk skip_transcoder": ({"kind": "skip_transcoder", "k": 3}, None, None, "sae"),
}


def called(folder: Path, format: str) -> str:
    if format == "saelens":
        return json.loads((folder / "cfg.json").read_text())["architecture"]
    if format == "dictionary_learning":
        return json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    return "sae"


@pytest.mark.parametrize("format", formats.WRITTEN)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_computes_the_same_there_and_comes_back(tmp_path, name, format):
    options, *names = WRITTEN[name]
    model, expected = made(options), names[formats.WRITTEN.index(format)]
    if expected is None:
        with pytest.raises(UsageError, match=r"SAELens has no|dictionary_learning has no|sparsify has only TopK"):
            formats.save(model, tmp_path / "out", format)
        assert not (tmp_path / "out").exists()
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    formats.save(model, tmp_path, format)
    assert called(tmp_path, format) == expected
    same(model, JUDGES[format](tmp_path))
    back = formats.load(tmp_path)
    same(back, (model.encode(X).dense(), model(X)))
    assert not back.training
    if expected in ("AutoEncoderTopK", "BatchTopKSAE", "topk", "sae", "matching_pursuit"):
        assert (back.config.k or back.config.base["k"]) == options["k"]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    back.save(tmp_path / "own")
    same(sae.load(tmp_path / "own"), (model.encode(X).dense(), model(X)))


@pytest.mark.parametrize("d_out", [4, 11])
def test_a_target_of_another_width(tmp_path, d_out):
    model = made({"kind": "skip_transcoder", "base": {"kind": "jumprelu", "l0": 3.0}}, d_out)
    formats.save(model, tmp_path, "saelens")
    assert json.loads((tmp_path / "cfg.json").read_text())["d_out"] == d_out
    same(model, by_saelens(tmp_path))
    same(formats.load(tmp_path), by_saelens(tmp_path))
    with pytest.raises(UsageError, match=f"targets are as wide as x, got d_in=7, d_out={d_out}"):
        formats.save(made({"kind": "transcoder", "k": 3}, d_out), tmp_path / "other", "sparsify")


def test_no_folder_holds_two_saes(tmp_path):
    ours, theirs = made({"kind": "topk", "k": 3}), made({"kind": "topk", "k": 5})
    ours.save(tmp_path / "own")
    for format in ("saelens", "sparsify"):
        with pytest.raises(UsageError, match=r"own holds .*sae.json.* of another format; give another folder"):
            formats.save(theirs, tmp_path / "own", format)
    assert formats.load(tmp_path / "own").sparsifier.k == 3
    formats.save(ours, tmp_path / "theirs", "saelens")
    with pytest.raises(UsageError, match=r"theirs holds cfg.json, sae_weights.safetensors; give another"):
        formats.save(theirs, tmp_path / "theirs", "saelens", overwrite=False)
    formats.save(theirs, tmp_path / "theirs", "saelens")
    assert formats.load(tmp_path / "theirs").sparsifier.k == 5
    assert "overwrite" not in (tmp_path / "theirs" / "cfg.json").read_text()


def test_a_threshold_below_zero_raises_pre_latents(tmp_path):
    model = made({"kind": "relu", "l0": 3.0})
    model.sparsifier.threshold.fill_(-0.2)
    formats.save(model, tmp_path, "saelens")
    assert called(tmp_path, "saelens") == "standard"
    same(model, by_saelens(tmp_path))


def test_metadata_is_said_where_there_is_a_place(tmp_path):
    model = made({"kind": "topk", "k": 3})
    formats.save(model, tmp_path / "one", "saelens", model_name="gpt2", format="kept")
    said = json.loads((tmp_path / "one/cfg.json").read_text())["metadata"]
    assert (said["model_name"], said["format"]) == ("gpt2", "kept")
    assert int(said["sae_lens_version"].split(".")[0]) >= 6
    formats.save(model, tmp_path / "two", "dictionary_learning", lm_name="gpt2", layer=3)
    trainer = json.loads((tmp_path / "two/config.json").read_text())["trainer"]
    assert (trainer["lm_name"], trainer["layer"], trainer["activation_dim"], trainer["dict_size"]) == ("gpt2", 3, D, F)
    with pytest.raises(UsageError, match="sparsify's format has no metadata, got hook"):
        formats.save(model, tmp_path / "three", "sparsify", hook="x")


def test_what_no_library_knows(tmp_path):
    class Own(type(made({"kind": "topk", "k": 3}).sparsifier)):
        pass

    model = made({"kind": "topk", "k": 3})
    model.sparsifier = Own(3)
    with pytest.raises(UsageError, match=r"kind 'topk' selects in its own way \(Own\)"):
        portable(model)
    with pytest.raises(UsageError, match="unknown format 'sealens'; did you mean 'saelens'"):
        formats.save(made({"kind": "relu"}), tmp_path, "sealens")


# What they write


def weights(transposed: bool = False, **more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)} | more
    return {name: normal(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def saelens(folder: Path, tensors: dict[str, Tensor], **cfg: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    whole = {"d_in": D, "d_sae": F, "dtype": "float32", "normalize_activations": "none", "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(whole | cfg))
    return folder


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
def test_a_topk_of_saelens(tmp_path, applied, rescaled):
    cfg = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": rescaled, "apply_b_dec_to_input": applied}
    saelens(tmp_path, weights(), **cfg)
    same(formats.load(tmp_path), by_saelens(tmp_path))


@pytest.mark.parametrize("applied", [True, False])
def test_a_matching_pursuit_of_saelens(tmp_path, applied):
    """Where b_dec is not subtracted, it is not added either."""
    W_dec = weights()["W_dec"]
    t = {"W_dec": W_dec / W_dec.norm(dim=1, keepdim=True), "b_dec": weights()["b_dec"]}
    stops = {"max_iterations": 3, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    saelens(tmp_path, t, architecture="matching_pursuit", apply_b_dec_to_input=applied, **stops)
    b_dec = t["b_dec"] if applied else 0
    z = pursued(X - b_dec, t["W_dec"], 3)
    same(formats.load(tmp_path), (z, z @ t["W_dec"] + b_dec))


def test_thresholds_below_zero_let_no_negative_code_pass(tmp_path):
    saelens(tmp_path, weights(threshold=(F,)), architecture="jumprelu")
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].min() < 0
    same(formats.load(tmp_path), by_saelens(tmp_path))


def test_sixteen_bits_become_float32(tmp_path):
    saelens(tmp_path, {name: tensor.bfloat16() for name, tensor in weights().items()}, architecture="standard")
    model = formats.load(tmp_path)
    assert model.W_dec.dtype == torch.float32
    assert torch.equal(model.W_dec, weights()["W_dec"].bfloat16().float())


DICTIONARIES = {
    "AutoEncoder": {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "bias": (D,)},
    "AutoEncoderNew": {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)},
    "GatedAutoEncoder": {
        **{"encoder.weight": (F, D), "decoder.weight": (D, F), "decoder_bias": (D,)},
        **{"r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,)},
    },
    "AutoEncoderTopK": {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "b_dec": (D,)},
    "BatchTopKSAE": {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "b_dec": (D,)},
    "JumpReluAutoEncoder": {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)},
    "MatryoshkaBatchTopKSAE": {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)},
}


def dictionary(folder: Path, name: str, threshold: float = 0.4) -> Path:
    tensors = {key: normal(*shape, seed=number) for number, (key, shape) in enumerate(DICTIONARIES[name].items())}
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        tensors |= {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if name == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([10, 20])
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": name, "k": 3, "activation_dim": D, "dict_size": F}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.mark.parametrize("threshold", [0.4, -1.0])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_what_dictionary_learning_writes(tmp_path, name, threshold, caplog):
    dictionary(tmp_path, name, threshold)
    same(formats.load(tmp_path), by_dictionary_learning(tmp_path))
    never_fitted = threshold < 0 and "BatchTopK" in name
    assert ("ae.pt has a threshold of -1, which was never fitted" in caplog.text) == never_fitted


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_what_sparsify_writes(tmp_path, transcode, skip):
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {"W_skip": (D, D)} if skip else {}
    save_file({name: normal(*shape) for name, shape in shapes.items()}, tmp_path / "sae.safetensors")
    cfg = {"activation": "topk", "num_latents": F, "k": 4, "skip_connection": skip, "transcode": transcode, "d_in": D}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    if skip and not transcode:
        with pytest.raises(UsageError, match="a skip connection from x to x has no counterpart here"):
            formats.load(tmp_path)
    else:
        same(formats.load(tmp_path), by_sparsify(tmp_path))


@pytest.mark.parametrize("d_out", [D, 5])
@pytest.mark.parametrize("named", ["params.npz", "other.npz", "folder"])
def test_what_gemma_scope_writes(tmp_path, named, d_out):
    t = weights(W_dec=(F, d_out), b_dec=(d_out,), threshold=(F,))
    file = tmp_path / ("params.npz" if named == "folder" else named)
    np.savez(file, **{name: tensor.numpy() for name, tensor in t.items()})
    z = jump(X @ t["W_enc"] + t["b_enc"], t["threshold"])
    same(formats.load(tmp_path if named == "folder" else file), (z, z @ t["W_dec"] + t["b_dec"]))


@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_what_openai_writes(tmp_path, activation, caplog):
    t = {
        "pre_bias": normal(D),
        "encoder.weight": normal(F, D),
        "latent_bias": normal(F),
        "decoder.weight": normal(D, F),
    }
    more = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": activation}
    more |= {"activation_state_dict": {"k": 4} if activation == "TopK" else {}}
    torch.save(t | more, tmp_path / "8.pt")
    pre = (X - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    z = top(pre, 4) if activation == "TopK" else pre.relu()
    same(formats.load(tmp_path / "8.pt"), (z, z @ t["decoder.weight"].T + t["pre_bias"]))
    assert ("reads normalised rows" in caplog.text) == (activation == "TopK")


# What is refused


def affine(**changed: object) -> dict[str, object]:
    return {"architecture": "standard"} | changed


@pytest.mark.parametrize(
    ("cfg", "tensors", "message"),
    [
        ({}, weights(), "does not give 'architecture'"),
        (
            affine(architecture="temporal"),
            weights(),
            "architecture 'temporal' has no counterpart here; known: standard",
        ),
        (affine(architecture="topk"), weights(), "does not give 'k'"),
        (
            affine(architecture="topk", k="many"),
            weights(),
            "k must be a whole number, got 'many'; write the file again",
        ),
        (affine(architecture="topk", k=2.5), weights(), "k must be a whole number, got 2.5"),
        (affine(architecture="topk", k=True), weights(), "k must be a whole number, got True"),
        (affine(architecture="topk", k=0), weights(), "k must lie in 1..d_sae=30, got 0"),
        (affine(architecture="topk", k=31), weights(), "k must lie in 1..d_sae=30, got 31"),
        (affine(architecture=["topk"]), weights(), r"architecture must be a text, got \['topk'\]"),
        (affine(d_in=None), weights(), "d_in must be a whole number, got None"),
        (affine(d_sae=999), weights(), r"d_sae is 999 in cfg\.json and 30 in sae_weights\.safetensors; copy both"),
        (affine(), weights(W_dec=(F,)), r"W_dec must be a tensor with 2 axes, got \[30\]"),
        (affine(), weights(W_dec=(0, D)), r"W_dec must be a tensor with 2 axes, got \[0, 7\]"),
        (affine(architecture="transcoder"), weights(), "apply_b_dec_to_input must be false in a transcoder"),
        (
            affine(normalize_activations="layer_norm"),
            weights(),
            "normalize_activations is 'layer_norm', which is not in the weights",
        ),
        (affine(activation_fn_str="topk"), weights(), "from an early SAELens .*load it in SAELens 6 and save it again"),
        (affine(), weights(threshold=(F,)), "holds no valid 'standard' of SAELens, .*: threshold unknown"),
        (affine(architecture="jumprelu"), weights(), "threshold missing"),
        (affine(), weights(b_enc=(F + 1,)), r"b_enc must be \[30\], got \[31\]"),
        (affine(), weights(W_dec=(F, 5), b_dec=(5,)), "W_dec must have d_in=7 columns, got 5"),
        (affine(), weights() | {"b_dec": torch.full((D,), torch.nan)}, "b_dec holds NaN or infinity"),
        (
            affine(architecture="matching_pursuit"),
            {k: weights()[k] for k in ("W_dec", "b_dec")},
            "may stop early",
        ),
        (
            affine(
                architecture="matching_pursuit", max_iterations=3, residual_threshold=0, stop_on_duplicate_support=False
            ),
            {name: weights()[name] for name in ("W_dec", "b_dec")},
            "with decoder rows of norm 1",
        ),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, cfg, tensors, message):
    saelens(tmp_path, tensors, **cfg)
    with pytest.raises(UsageError, match=message) as raised:
        formats.load(tmp_path)
    assert "\n" not in str(raised.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/evil"),))


@pytest.mark.parametrize("what", ["a pickle", "not a file of torch", "a list", "empty"])
def test_a_pickle_is_never_run(tmp_path, what, monkeypatch):
    dictionary(tmp_path, "AutoEncoder")
    reached = tmp_path / "reached"
    monkeypatch.setattr(Evil, "__reduce__", lambda self: (Path.touch, (reached,)))
    file = tmp_path / "ae.pt"
    if what == "a pickle":
        torch.save({"encoder.weight": Evil()}, file)
    elif what == "not a file of torch":
        file.write_bytes(pickle.dumps([Evil()]))
    elif what == "a list":
        torch.save([1, 2], file)
    else:
        file.write_bytes(b"")
    with pytest.raises(UsageError, match=r"ae\.pt (does not hold only tensors|must hold a state_dict)") as raised:
        formats.load(tmp_path)
    assert not reached.exists()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("trainer", "tensors", "message"),
    [
        (None, {}, "trainer must be a mapping, got None"),
        ({"dict_class": 3}, {}, "dict_class must be a text, got 3"),
        ({"dict_class": "BatchTopKSAE", "k": 4}, {}, r"k is 4 in config\.json but 3 in ae\.pt; copy both again"),
        (
            {"dict_class": "BatchTopKSAE", "k": 3},
            {"threshold": torch.zeros(2)},
            "threshold must be a tensor with 0 axes",
        ),
        ({"dict_class": "BatchTopKSAE", "k": 3}, {"b_dec": 3.0}, "b_dec must be a tensor with 1 axes, got float"),
        ({"dict_class": "BatchTopKSAE", "k": 3}, {7: torch.zeros(2)}, "7 unknown"),
        ({"dict_class": "BatchTopKSAE", "k": 3}, {"b_dec": torch.zeros(3)}, r"b_dec must be \[7\], got \[3\]"),
    ],
)
def test_dictionaries_that_do_not_add_up(tmp_path, trainer, tensors, message):
    dictionary(tmp_path, "BatchTopKSAE")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(torch.load(tmp_path / "ae.pt", weights_only=True) | tensors, tmp_path / "ae.pt")
    with pytest.raises(UsageError, match=message) as raised:
        formats.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["ae.pt", "params.npz"])
def test_damaged_files_are_told_in_one_line(tmp_path, file):
    """Cut short, and with bytes changed: whatever they raise inside."""
    dictionary(tmp_path, "AutoEncoder")
    np.savez_compressed(tmp_path / "params.npz", **{name: t.numpy() for name, t in weights(threshold=(F,)).items()})
    whole = (tmp_path / file).read_bytes()
    (tmp_path / ("config.json" if file == "params.npz" else "params.npz")).unlink()
    stream = np.random.default_rng(0)
    refused = 0
    for number in range(40):
        damaged = bytearray(whole[: int(stream.integers(len(whole)))] if number % 2 else whole)
        for place in stream.integers(max(len(damaged), 1), size=30) if damaged else []:
            damaged[place] = stream.integers(256)
        (tmp_path / file).write_bytes(bytes(damaged))
        refused += damaged_is_refused(tmp_path, file)
    assert refused > 20


def damaged_is_refused(folder: Path, file: str) -> bool:
    """False: the damage did not show, as where a number became another."""
    said = ""
    try:
        formats.load(folder)
    except UsageError as error:
        said = str(error)
    return bool(said) and file in said and "\n" not in said


def test_metadata_that_no_file_can_say_leaves_no_half_folder(tmp_path):
    model = made({"kind": "topk", "k": 3})
    for format in ("saelens", "dictionary_learning"):
        for value in (torch.tensor(3), float("nan")):
            with pytest.raises(UsageError, match="metadata must be text, numbers, lists or mappings of these"):
                formats.save(model, tmp_path / format, format, layer=value)
        assert not (tmp_path / format).exists()
    formats.save(model, tmp_path / "own", "dictionary_learning", k=99, dict_class="AutoEncoder")
    same(formats.load(tmp_path / "own"), (model.encode(X).dense(), model(X)))


def test_files_that_are_no_sae(tmp_path):
    with pytest.raises(UsageError, match=r"there is no .*absent"):
        formats.load(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"holds no SAE that is known: sae\.json with"):
        formats.load(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    with pytest.raises(UsageError, match=r"is a run that is not finished; train it to the end, or save its"):
        formats.load(tmp_path / "run")
    dictionary(tmp_path, "AutoEncoder")
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "CrossCoder"}}')
    with pytest.raises(UsageError, match="dict_class 'CrossCoder' has no counterpart here"):
        formats.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        formats.load(tmp_path)
    saelens(tmp_path / "half", weights(), **affine())
    (tmp_path / "half/sae_weights.safetensors").write_bytes(b"12345678")
    with pytest.raises(UsageError, match=r"sae_weights\.safetensors cannot be read"):
        formats.load(tmp_path / "half")
    (tmp_path / "params.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"params\.npz cannot be read"):
        formats.load(tmp_path / "params.npz")
    with pytest.raises(UsageError, match=r"sae\.formats\.load for the files of another library"):
        sae.load(tmp_path)


# The command


def test_convert(run_cli, tmp_path):
    model = made({"kind": "jumprelu", "l0": 3.0})
    model.save(tmp_path / "run")
    outcome = run_cli("convert", tmp_path / "run", "--metadata", "{model_name: gpt2}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"wrote {tmp_path / 'run-saelens'}/: jumprelu, d_in=7, d_sae=30")
    same(model, by_saelens(tmp_path / "run-saelens"))
    assert json.loads((tmp_path / "run-saelens/cfg.json").read_text())["metadata"]["model_name"] == "gpt2"
    run_cli("convert", tmp_path / "run").assert_refused("holds cfg.json, sae_weights.safetensors", "--overwrite")
    assert run_cli("convert", tmp_path / "run", "--overwrite").code == 0
    outcome = run_cli("convert", tmp_path / "run-saelens", "--to", "sae", "--out", tmp_path / "back")
    assert outcome.code == 0, outcome.err
    same(sae.load(tmp_path / "back"), by_saelens(tmp_path / "run-saelens"))


def test_what_convert_refuses(run_cli, tmp_path):
    made({"kind": "jumprelu", "l0": 3.0}).save(tmp_path / "run")
    run_cli("convert", tmp_path / "run", "--to", "sparsify").assert_refused("sparsify has only TopK", "thresholds")
    run_cli("convert", tmp_path / "run", "--to", "sealens").assert_refused("did you mean 'saelens'?")
    run_cli("convert", tmp_path / "run", "--metadata", "gpt2").assert_refused("--metadata must be a mapping")
    run_cli("convert", tmp_path / "run", "--metadata", "{a: [").assert_refused("--metadata {a: [")
    own = ("--to", "sae", "--out", tmp_path / "x", "--metadata", "{a: 1}")
    run_cli("convert", tmp_path / "run", *own).assert_refused("our own format has no metadata, got a")
    (tmp_path / "unfinished/checkpoints").mkdir(parents=True)
    into = ("--to", "sae", "--overwrite", "--out", tmp_path / "unfinished")
    run_cli("convert", tmp_path / "run", *into).assert_refused("holds a run (checkpoints), which would end as another")
    (tmp_path / "unfinished/checkpoints").rmdir()
    (tmp_path / "unfinished").rmdir()
    (tmp_path / "file").touch()
    run_cli("convert", tmp_path / "run", "--out", tmp_path / "file/x").assert_refused("cannot write to")
    run_cli("convert", tmp_path / "run", "--out", tmp_path / "file").assert_refused("is a file")
    run_cli("convert", tmp_path / "file").assert_refused("holds no SAE that is known")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
