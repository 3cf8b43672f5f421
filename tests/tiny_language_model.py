"""A language model small enough for tests: GPT-2 with random weights, a tokenizer, and made-up texts."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

D, N_LAYERS, N_POSITIONS = 16, 3, 24
WORDS = tuple("the cat dog sat ran on a mat red blue house tree and then it was very big small".split())  # noqa: SIM905


class Tiny(NamedTuple):
    """Where it is, and what it is."""

    folder: Path
    texts: list[str]

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def jsonl(self) -> str:
        return str(self.folder / "texts.jsonl")

    def network(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model).eval()

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.model)

    def section(self, **more: object) -> dict[str, object]:
        """A section `source`."""
        usual = {"kind": "model", "model": self.model, "module": "transformer.h.1", "texts": self.jsonl}
        return usual | {"context_length": 12, "n_tokens": 6000} | more


def make(folder: Path) -> Tiny:
    logging.disable_progress_bar()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(400)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text, "n": n}) for n, text in enumerate(texts)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=290, n_positions=N_POSITIONS, n_embd=D, n_layer=N_LAYERS, n_head=2, bos_token_id=0, eos_token_id=0
    )
    network = GPT2LMHeadModel(config)
    for weight in network.parameters():
        weight.data.mul_(4)  # as it is made, every layer does next to nothing
    network.save_pretrained(folder / "model")
    return Tiny(folder, texts)
