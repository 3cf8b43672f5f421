"""The other libraries, where they are installed, load what we write, and we load what they write."""

import sys
import types
import warnings
from importlib.util import find_spec

import pytest
import torch

from sae import UsageError, formats
from tests.test_formats import WRITTEN, D, F, X, made, normal, same

JUDGES = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
if not any(find_spec(name) for name in JUDGES.values()):
    pytest.skip("none of the other libraries is installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def library(name: str) -> types.ModuleType:
    """Imported; what it only imports itself is not needed."""
    if name == "dictionary_learning":
        nnsight = types.ModuleType("nnsight")
        nnsight.LanguageModel = object
        sys.modules.setdefault("nnsight", nnsight)
    return pytest.importorskip(name, reason=f"{name} is not installed")


@torch.no_grad()
def theirs(format: str, folder) -> tuple[torch.Tensor, torch.Tensor]:
    module = library(JUDGES[format])
    if format == "saelens":
        model = module.SAE.load_from_disk(str(folder))
        return model.encode(X), model(X)
    if format == "dictionary_learning":
        from dictionary_learning.utils import load_dictionary

        model, _ = load_dictionary(str(folder), "cpu")
        codes = model.encode(X)
        return codes, model.decode(codes)
    model = module.SparseCoder.load_from_disk(folder)
    found = model.encode(X)
    return torch.zeros(len(X), F).scatter_(1, found.top_indices, found.top_acts), model(X).sae_out


@pytest.mark.parametrize("format", JUDGES)
@pytest.mark.parametrize("name", WRITTEN)
def test_they_load_what_we_write(tmp_path, name, format):
    library(JUDGES[format])
    model = made(WRITTEN[name][0])
    if format == "dictionary_learning":  # whose loader gives rows norm 1 itself
        model.W_dec.div_(model.W_dec.norm(dim=1, keepdim=True))
    try:
        formats.save(model, tmp_path, format)
    except UsageError:
        assert WRITTEN[name][1 + formats.WRITTEN.index(format)] is None
        return
    assert WRITTEN[name][1 + formats.WRITTEN.index(format)] is not None
    same(model, theirs(format, tmp_path))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "transcoder", "skip_transcoder"])
def test_we_load_what_sae_lens_writes(tmp_path, architecture):
    library("sae_lens")
    from sae_lens.registry import get_sae_class

    cls, config = get_sae_class(architecture)
    more = {"topk": {"k": 3}, "transcoder": {"d_out": 5}, "skip_transcoder": {"d_out": 5}}.get(architecture, {})
    if "transcoder" in architecture:
        more["apply_b_dec_to_input"] = False
    model = cls(config(d_in=D, d_sae=F, **more))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    model.save_model(tmp_path)
    same(formats.load(tmp_path), theirs("saelens", tmp_path))


@pytest.mark.parametrize("options", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}])
def test_we_load_what_sparsify_writes(tmp_path, options):
    sparsify = library("sparsify")
    model = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=3, **options))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    model.save_to_disk(tmp_path)
    same(formats.load(tmp_path), theirs("sparsify", tmp_path))


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"])
def test_we_load_what_dictionary_learning_writes(tmp_path, name):
    library("dictionary_learning")
    import json

    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    classes = {cls.__name__: cls for cls in (AutoEncoder, AutoEncoderTopK, BatchTopKSAE, JumpReluAutoEncoder)}
    model = classes[name](D, F, *([3] if "TopK" in name else []))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
        rows = model.W_dec if name == "JumpReluAutoEncoder" else model.decoder.weight.T
        rows /= rows.norm(dim=1, keepdim=True)
        if name == "BatchTopKSAE":
            model.threshold.fill_(0.3)
    torch.save(model.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": 3}, "buffer": {}}))
    same(formats.load(tmp_path), theirs("dictionary_learning", tmp_path))
