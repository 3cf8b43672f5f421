"""`sae latents`: the texts in which latents fire most, as a page and as files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import formats, hub
from sae.config import SourceConfig, parse_config
from sae.config_text import read_yaml
from sae.errors import UsageError
from sae.latents.examples import NOWHERE, Examples, codes_at, find_examples
from sae.latents.logits import Logits, logits_of
from sae.latents.passages import Texts, open_texts, place_of
from sae.locks import held
from sae.model import load
from sae.names import CONFIG, LATENTS
from sae.networks.language_model import load_tokenizer
from sae.report.latents import write_page
from toymodels.files import save_tensors, write_text

logger = logging.getLogger("sae")

PAGE, SHOWN, TENSORS = LATENTS
# Tokens around the one for which a latent fires most.
BEFORE, BEHIND = 20, 8
# Tokens that a latent raises most, and as many that it lowers.
N_TOKENS = 10


def describe(
    path: Path,
    which: Sequence[int] = (),
    n_latents: int = 100,
    n_examples: int = 8,
    n_rows: int = 200_000,
    *,
    source: SourceConfig | None = None,
    out: Path | None = None,
) -> Path:
    """Writes where latents fire most, and a page that shows some of them, into a run's directory; returns the page.

    `which` names latents to show; otherwise n_latents of those that fire are shown, from the most frequent to the
    rarest at equal distances in rank. The first n_rows rows that the run was trained on are searched. With another
    `source`, `path` may be an SAE of any library.

    Raises:
        UsageError: the activations are not those of a language model, or there are no such latents.
    """
    if source is None:
        sae, where = load(path), path / CONFIG
        if not where.exists():
            raise UsageError(f"{path} is an SAE without a run ({CONFIG}); name its texts with --source")
        texts = open_texts(parse_config(read_yaml(where), where=str(where)).source, n_rows)
    else:
        sae, texts = formats.load(path), open_texts(source, n_rows)
        _tell_of_another_place(path, source)
        out = out or hub.beside(path, "latents")
    out = path if out is None else out
    wrong = [latent for latent in which if not 0 <= latent < sae.d_sae]
    if wrong:
        raise UsageError(f"latents are numbered 0 to {sae.d_sae - 1}, got {', '.join(map(str, wrong))}; give others")
    if texts.d_in != sae.d_in:
        raise UsageError(f"the SAE reads {sae.d_in} dimensions, but the activations have {texts.d_in}; give its own")
    with held(out):
        examples = find_examples(sae, texts.passages(), n_examples)
        chosen = list(dict.fromkeys(which)) or evenly(examples.frequency, n_latents)
        wanted = [
            (int(context), latent) for latent in chosen for context in examples.context[latent] if context != NOWHERE
        ]
        lines = codes_at(sae, texts.passages(), wanted, texts.tokens.shape[1])
        words = word_of(texts)
        logits = None if texts.network is None else logits_of(texts.network, sae.W_dec[chosen], N_TOKENS)
        shown = {
            "sae": f"{sae.config.kind} of {hub.said(path)}",
            "activations": texts.name,
            "n_rows": examples.n_rows,
            "n_firing": int((examples.frequency > 0).sum()),
            "d_sae": sae.d_sae,
            "chosen": bool(which),
            "latents": [
                _described(latent, examples, lines, texts.tokens, words)
                | ({} if logits is None else _written(logits, number, words))
                for number, latent in enumerate(chosen)
            ],
        }
        tensors = {name: getattr(examples, name) for name in ("frequency", "value", "context", "position")}
        save_tensors(out / TENSORS, tensors)
        write_text(out / SHOWN, json.dumps(shown, ensure_ascii=False, indent=1) + "\n")
        return write_page(out / SHOWN, out / PAGE)


def evenly(frequency: Tensor, n: int) -> list[int]:
    """n of the latents that fire, in order of frequency, at equal distances in rank."""
    alive = frequency.argsort(descending=True, stable=True)[: int((frequency > 0).sum())]
    return alive[torch.linspace(0, len(alive) - 1, min(n, len(alive))).round().long()].tolist()


def word_of(texts: Texts) -> Callable[[int], str]:
    """A token as text; its number where no tokenizer is known."""
    if texts.tokenizer is None:
        return lambda token: f" {token}"
    tokenizer = load_tokenizer(texts.tokenizer, texts.revision)

    def word(token: int) -> str:
        said = tokenizer.decode([token])
        return said if "\ufffd" not in said else tokenizer.convert_ids_to_tokens(token)  # part of a character

    return cache(word)


def _described(
    latent: int, examples: Examples, lines: dict[tuple[int, int], Tensor], tokens: Tensor, words: Callable[[int], str]
) -> dict[str, Any]:
    """One latent, in words that JSON knows."""
    found = []
    for context, position in zip(examples.context[latent].tolist(), examples.position[latent].tolist(), strict=True):
        if context == NOWHERE:
            break
        window = slice(max(position - BEFORE, 0), position + BEHIND + 1)
        found.append(
            {
                "context": context,
                "position": position,
                "tokens": [words(token) for token in tokens[context, window].tolist()],
                "values": [float(f"{value:.4g}") for value in lines[context, latent][window].tolist()],
                "peak": position - window.start,
            }
        )
    return {"latent": latent, "frequency": float(examples.frequency[latent]), "examples": found}


def _written(logits: Logits, number: int, words: Callable[[int], str]) -> dict[str, Any]:
    """Tokens that a latent raises and lowers, the first of them most, in words that JSON knows."""
    ends = {
        "raises": (logits.raised[number], logits.raised_by[number]),
        "lowers": (logits.lowered[number], logits.lowered_by[number]),
    }
    return {
        name: [[words(token), float(f"{by:.3g}")] for token, by in zip(tokens.tolist(), amounts.tolist(), strict=True)]
        for name, (tokens, amounts) in ends.items()
    }


def _tell_of_another_place(path: Path, source: SourceConfig) -> None:
    """Logs a line if the SAE was trained on another module, since its latents mean little there."""
    if not (path / CONFIG).is_file():
        return
    own, other = (place_of(one) for one in (parse_config(read_yaml(path / CONFIG), where=str(path)).source, source))
    if own is not None and other is not None and own != other:
        logger.warning("%s was trained on %s, but these are activations of %s", path, own, other)
