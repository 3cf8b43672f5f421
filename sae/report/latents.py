"""The page that shows what latents fire for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae.names import REPORT
from toymodels.files import write_text
from toymodels.pages import Html, join, page, tag

# How many shades a token's background has.
N_SHADES = 9
# What would break a line or cannot be seen, and what stands for it.
SHOWN_AS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


def write_page(data: Path, target: Path) -> Path:
    """Draws what `sae latents` found, and returns where the page is."""
    found = json.loads(data.read_text(encoding="utf-8"))
    report = REPORT if (target.parent / REPORT).is_file() else None
    write_text(target, page(f"What latents fire for: {found['sae']}", contents(found, report)))
    return target


def contents(found: Mapping[str, Any], report: str | None = None) -> Html:
    """Every latent of the file, in its order; and a link to the run's report, where it lies beside."""
    latents, n_rows = found["latents"], found["n_rows"]
    how = (
        "Those that were asked for"
        if found["chosen"]
        else "From the most frequent to the rarest, at equal distances in rank"
    )
    lines = (
        f"{how}. For each the contexts, out of {n_rows:,} tokens, in which it fires most, around the token where it "
        "does (underlined). The darker a token, the more the latent fires there; the darkest is its largest code "
        "anywhere. ⏎ is the end of a line."
    )
    if any("raises" in latent for latent in latents):
        lines += (
            " What a latent raises are the tokens that its decoder row makes likelier where it is added to the "
            "residual stream, by the model's last norm and unembedding alone; what it lowers, less likely."
        )
    firing = f"{found['n_firing']:,} of {found['d_sae']:,} latents fire for at least one of these tokens."
    what = f"{found['sae']}, on {found['activations']}."
    more = [] if report is None else [" Its metrics are in the ", tag("a", "report", href=report), "."]
    header = tag(
        "header",
        tag("h1", "What latents fire for"),
        tag("p", what, *more, class_="reading"),
        tag("p", firing, class_="verdict"),
        tag("p", lines, class_="reading"),
    )
    return join([header, *(card(latent) for latent in latents)])


def card(latent: Mapping[str, Any]) -> Html:
    """One latent."""
    examples = latent["examples"]
    title = tag("h3", f"Latent {latent['latent']}", id=f"latent-{latent['latent']}")
    if not examples:
        return tag("section", title, tag("p", "It fires for none of these tokens.", class_="reading"), class_="latent")
    largest = max(max(example["values"]) for example in examples)
    often = f"fires for {_share(latent['frequency'])} of the tokens, up to {largest:.3g}; most on "
    peaks = Counter(_visible(example["tokens"][example["peak"]]).replace(" ", "·") for example in examples)
    counted = [[tag("code", word), f" ×{n}" if n > 1 else ""] for word, n in peaks.most_common(4)]
    parts = [part for number, pair in enumerate(counted) for part in ([", "] if number else []) + pair]
    readings = [tag("p", often, *parts, class_="reading")]
    if "raises" in latent:
        ends = ("raises ", *_tokens(latent["raises"]), " and lowers ", *_tokens(latent["lowers"]))
        readings.append(tag("p", *ends, class_="reading"))
    lines = [snippet(example["tokens"], example["values"], example["peak"], largest) for example in examples]
    return tag("section", title, *readings, tag("div", *lines, class_="texts"), class_="latent")


def _tokens(tokens: Sequence[Sequence[Any]]) -> list[Html | str]:
    """`·the, ·a`: each with by how much."""
    words = [tag("code", _visible(word).replace(" ", "·"), title=f"by {by:+.1f} sd") for word, by in tokens]
    return [part for number, word in enumerate(words) for part in ((", ", word) if number else (word,))]


def snippet(tokens: Sequence[str], values: Sequence[float], peak: int, largest: float) -> Html:
    """Tokens in a row, each as dark as the latent fires there."""
    marked = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        shade = round(N_SHADES * value / largest)
        classes = " ".join(([f"s{shade}"] if shade else []) + (["peak"] if place == peak else []))
        marked.append(tag("span", _visible(token), class_=classes) if classes else _visible(token))
    # The token of its largest code is in one column in all texts, as in a concordance.
    before, behind = tag("span", *marked[:peak]), tag("span", *marked[peak:])
    return tag("div", tag("div", before), tag("div", behind))


def _visible(token: str) -> str:
    shown = token.translate(SHOWN_AS)
    return shown if shown.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def _share(frequency: float) -> str:
    """A percentage with two digits that count."""
    return f"{100 * frequency:.2g} %"
