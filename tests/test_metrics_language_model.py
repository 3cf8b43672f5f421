"""Judges of what a language model loses: the formulas in float64, known replacements, a trained transformer."""

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import sae
from sae.errors import UsageError
from sae.metrics import Spliced
from toymodels.sequences import QuotingText
from toymodels.streams import generator
from toymodels.transformer import Transformer, TransformerRecipe

VOCABULARY, D, BATCH, LENGTH = 11, 6, 5, 9


class Block(nn.Module):
    """Gives a tuple, as the blocks of many language models do, and mixes what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, generator=generator(0, "test", "block")))

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return torch.tanh(x.cumsum(dim=1) @ self.weight), "cache"


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Model(nn.Module):
    """p(t | context) = softmax(W_U (e + block(e) + block(block(e)))), e the embeddings."""

    def __init__(self, as_object: bool = False) -> None:
        super().__init__()
        stream = generator(0, "test", "model")
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, D, generator=stream))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unembed = nn.Parameter(torch.randn(D, VOCABULARY, generator=stream))
        self.unused, self.as_object = nn.Linear(D, D), as_object
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor | Output:
        x = self.embed(tokens)
        middle, _ = self.blocks[0](x)
        end, _ = self.blocks[1](x=middle)
        logits = (x + middle + end) @ self.unembed
        return Output(logits) if self.as_object else logits


TOKENS = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator(0, "test", "tokens"))


def half(x: Tensor) -> Tensor:
    """A reconstruction that depends on its row alone, and is wrong."""
    return 0.5 * x + x.roll(1, dims=1) ** 2


def by_hand(model: Model, replace, mask: Tensor | None = None, transcodes: bool = False) -> Tensor:
    """log p of all tokens after each position, in float64, the first block's output replaced."""
    model = model.double()
    x = model.embed(TOKENS)
    middle, _ = model.blocks[0](x)
    if replace is not None:
        chosen = torch.ones_like(TOKENS, dtype=torch.bool) if mask is None else mask
        middle = torch.where(chosen[..., None], replace((x if transcodes else middle).flatten(0, 1)).view_as(x), middle)
    end, _ = model.blocks[1](middle)
    return ((x + middle + end) @ model.unembed).log_softmax(dim=-1)


@torch.no_grad()
def judge(mask: Tensor | None = None, transcodes: bool = False) -> dict[str, float]:
    clean, spliced, zero = (
        by_hand(Model(), replace, mask, transcodes)[:, :-1] for replace in (None, half, torch.zeros_like)
    )
    counts = torch.ones(BATCH, LENGTH - 1, dtype=torch.bool) if mask is None else mask[:, :-1] & mask[:, 1:]

    def ce(predicted: Tensor) -> float:
        return -float(predicted.gather(2, TOKENS[:, 1:, None])[..., 0][counts].mean())

    values = {"ce_clean": ce(clean), "ce_spliced": ce(spliced), "ce_zero": ce(zero)}
    values["ce_recovered"] = (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean))
    values["kl"] = float((clean.exp() * (clean - spliced)).sum(dim=2)[counts].mean())
    return values


def measured(replace, mask: Tensor | None = None, *, parts: int = BATCH, transcodes: bool = False) -> dict[str, float]:
    whole = Spliced(Model(), "blocks.0", replace, transcodes=transcodes)
    masks = [None] * BATCH if mask is None else mask.split(parts)
    for tokens, one in zip(TOKENS.split(parts), masks, strict=False):
        whole.update(tokens, one)
    return whole.compute()


@pytest.mark.parametrize("transcodes", [False, True])
def test_the_formulas(transcodes):
    assert measured(half, transcodes=transcodes) == pytest.approx(judge(transcodes=transcodes), rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_of_any_size(parts):
    assert measured(half, parts=parts) == pytest.approx(judge(), rel=1e-5)


def test_a_mask_keeps_activations_and_leaves_predictions_out():
    mask = torch.rand(BATCH, LENGTH, generator=generator(0, "test", "mask")) > 0.3
    mask[:, 0] = False
    mask[2] = False
    assert measured(half, mask, parts=1) == pytest.approx(judge(mask), rel=1e-5)


def test_logits_may_come_in_an_object_and_the_module_as_itself():
    model = Model(as_object=True)
    whole = Spliced(model, model.blocks[0], half)
    whole.update(TOKENS)
    assert whole.compute() == pytest.approx(judge(), rel=1e-5)


def test_known_replacements():
    perfect = measured(lambda x: x)
    assert perfect["ce_recovered"] == 1
    assert perfect["kl"] == pytest.approx(0, abs=1e-6)
    nothing = measured(torch.zeros_like)
    assert nothing["ce_recovered"] == 0
    assert nothing["kl"] > 0.01


def test_the_model_is_left_as_it_was():
    model = Model()
    before = model(TOKENS)
    Spliced(model, "blocks.1", half).update(TOKENS)
    assert torch.equal(model(TOKENS), before)
    with pytest.raises(ZeroDivisionError):
        Spliced(model, "blocks.0", lambda x: x / (1 // 0)).update(TOKENS)
    assert torch.equal(model(TOKENS), before)


def test_a_models_own_type_is_kept():
    model = Model().to(torch.bfloat16)
    whole = Spliced(model, "blocks.0", lambda x: half(x.float()))
    whole.update(TOKENS)
    assert whole.compute()["ce_spliced"] == pytest.approx(judge()["ce_spliced"], rel=0.05)


def test_tokens_of_any_integer():
    whole = Spliced(Model(), "blocks.0", half)
    whole.update(TOKENS.int())
    assert whole.compute() == pytest.approx(judge(), rel=1e-5)


def test_tokens_that_are_never_predicted():
    """−inf for what a model forbids: 0 log 0 is 0."""

    class Forbids(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = super().forward(tokens)
            return torch.cat([logits, torch.full_like(logits, -torch.inf)], dim=2)

    whole = Spliced(Forbids(), "blocks.0", half)
    whole.update(TOKENS)
    assert whole.compute() == pytest.approx(judge(), rel=1e-5)


class Named(NamedTuple):
    hidden: Tensor
    cache: str


def test_named_outputs_and_modules_that_work_in_place():
    class InPlace(Block):
        def forward(self, x: Tensor) -> Named:
            hidden = super().forward(x)[0]
            x.mul_(3)
            return Named(hidden, "cache")

    class Reads(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0] = InPlace().eval()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            middle = self.blocks[0](x.clone()).hidden
            return (x + middle + self.blocks[1](middle)[0]) @ self.unembed

    whole = Spliced(Reads(), "blocks.0", half, transcodes=True)
    whole.update(TOKENS)
    assert whole.compute() == pytest.approx(judge(transcodes=True), rel=1e-5)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda hidden: ["mask", hidden], lambda output: output[1]),
        (lambda hidden: ("mask", hidden), lambda output: output[1]),
        (lambda hidden: {"mask": None, "hidden": hidden}, lambda output: output["hidden"]),
        (BaseModelOutput, lambda output: output.last_hidden_state),
    ],
    ids=["list", "tuple", "mapping", "transformers"],
)
def test_whatever_a_module_puts_out_its_first_tensor_is_replaced(wrap, unwrap):
    class Wrapped(Block):
        def forward(self, x: Tensor) -> object:
            return wrap(super().forward(x)[0])

    class Unwraps(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0] = Wrapped().eval()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            middle = unwrap(self.blocks[0](x))
            return (x + middle + self.blocks[1](middle)[0]) @ self.unembed

    whole = Spliced(Unwraps(), "blocks.0", half)
    whole.update(TOKENS)
    assert whole.compute() == pytest.approx(judge(), rel=1e-5)


@pytest.mark.parametrize(
    ("module", "replace", "tokens", "said"),
    [
        ("block.0", half, TOKENS, "no module 'block.0'.*blocks.0"),
        (nn.Linear(2, 2), half, TOKENS, "no module like the Linear"),
        ("unused", half, TOKENS, "ran it 0 times"),
        ("blocks.0", lambda x: x[:, :2], TOKENS, r"gives \[45, 2\] for activations \[45, 6\]"),
        ("blocks.0", lambda x: x * torch.nan, TOKENS, "not finite"),
        ("blocks.0", half, TOKENS[:, :1], r"got \[5, 1\]"),
    ],
)
def test_what_cannot_be_spliced(module, replace, tokens, said):
    with pytest.raises(UsageError, match=said):
        Spliced(Model(), module, replace).update(tokens)


def test_other_mistakes():
    model = Model()
    update = inspect.unwrap(Spliced.update)  # users run without jaxtyping
    with pytest.raises(UsageError, match=r"at least 2 positions, got \[9\]"):
        update(Spliced(model, "blocks.0", half), TOKENS[0])
    with pytest.raises(UsageError, match=r"mask must be \[5, 9\] like tokens, got \[2, 2\]"):
        update(Spliced(model, "blocks.0", half), TOKENS, torch.ones(2, 2))
    with pytest.raises(UsageError, match="no token was predicted"):
        Spliced(model, "blocks.0", half).compute()
    whole = Spliced(model, "blocks.0", half)
    model.blocks[1].train()
    with pytest.raises(UsageError, match=r"model.eval\(\)"):
        whole.update(TOKENS)
    narrow = sae.SAE(4, sae.SAEConfig.of_kind({"kind": "topk", "d_sae": 8, "k": 2}))
    with pytest.raises(ValueError, match="this SAE reads another width"):
        Spliced(Model(), "blocks.0", narrow).update(TOKENS)


class OneOfAStack(nn.Module):
    """A transformer of a stack of one, with a module where its residual stream ends."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer, self.residual = transformer, nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer.unembed(self.residual(self.transformer.residual(tokens[None])[0])[None])[0]


def test_a_trained_sae_keeps_what_a_trained_transformer_knows(tmp_path):
    text = QuotingText.random(generator(0, "test", "text"), n_choices=4)
    world = TransformerRecipe(n_steps=200, d_hidden=32, n_layers=1, make_sequences=lambda: text).build(0)
    tokens = text.sample(64, generator(1, "test", "sequences"))
    model = OneOfAStack(world.model).eval()
    recovered = []
    for n_samples in (2048, 200_000):
        options = {"sae": {"kind": "topk", "d_sae": 256, "k": 8}, "train": {"n_samples": n_samples, "batch_size": 1024}}
        config = sae.TrainConfig.model_validate({**options, "out": tmp_path / str(n_samples)})
        acts = world.sample(100_000, generator(0, "test", "activations")).hidden
        whole = Spliced(model, "residual", sae.train(config, acts, report=False).sae)
        whole.update(tokens)
        recovered.append(whole.compute())
    assert recovered[0]["ce_recovered"] < recovered[1]["ce_recovered"]
    assert recovered[1]["ce_recovered"] > 0.9
    assert recovered[0]["kl"] > recovered[1]["kl"] > 0
