"""One page for all results: index.html, drawn only from the folders of the experiments."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toymodels.experiments import NAMES, experiment
from toymodels.files import write_text
from toymodels.pages import Html, folded, join, page, table, tag
from toymodels.runner import ERROR, INDEX, RESULT

# Above this size a drawing of many points is smaller, and quicker, as a picture.
MAX_SVG_BYTES = 400_000
N_SHOWN = 8
RELATIONS = {"within": "", "at_least": "≥ ", "at_most": "≤ ", "equals": ""}
SOURCES = {
    "RUN": "earlier runs",
    "EXACT": "quadrature",
    "DERIVED": "algebra",
    "PROPOSED": "calibrated over seeds",
}


def write_gallery(out: Path) -> Path:
    """Writes out/index.html about every experiment in `out`, and returns where it is."""
    failed = [name for name in NAMES if (out / name / ERROR).exists()]
    found = [(name, _read(out / name)) for name in NAMES if name not in failed and (out / name / RESULT).exists()]
    title = "Toy models of superposition"
    body = join(
        [
            tag("h1", title),
            tag("p", "More features than dimensions: what small networks do, and the numbers that show it."),
            _summary(found, failed),
            _contents(found, failed),
            *(_failure(name, out / name) for name in failed),
            *(_section(name, result, out / name) for name, result in found),
            _footer([result for _, result in found]),
        ]
    )
    target = out / INDEX
    write_text(target, page(title, body))
    return target


def verdict(claims: Sequence[Mapping[str, Any]]) -> str:
    """`8 of 9 claims hold`."""
    held = sum(claim["holds"] for claim in claims)
    if held == len(claims) == 1:
        return "the claim holds"
    return f"all {held} claims hold" if held == len(claims) else f"{held} of {len(claims)} claims hold"


def number(value: float | None) -> str:
    """Four significant digits, with a true minus sign."""
    return "none" if value is None else f"{value:.4g}".replace("-", "−")


def target_of(claim: Mapping[str, Any]) -> str:
    """`0.4 ± 0.01`, `≥ 2`."""
    spread = f" ± {number(claim['tolerance'])}" if claim["relation"] == "within" else ""
    return f"{RELATIONS[claim['relation']]}{number(claim['target'])}{spread}"


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _summary(found: Sequence[tuple[str, dict[str, Any]]], failed: Sequence[str]) -> Html:
    claims = [claim for _, result in found for claim in result["claims"]]
    plural = "" if len(found) == 1 else "s"
    words = f"{len(found)} experiment{plural}: {verdict(claims)}." if claims else "Nothing was measured."
    if failed:
        words += f" {len(failed)} ended with an error: {', '.join(failed)}."
    return tag("p", words, class_="verdict")


def _contents(found: Sequence[tuple[str, dict[str, Any]]], failed: Sequence[str]) -> Html:
    """A line each: what it is, what it claims, whether that holds."""
    entries = []
    for name in NAMES:
        results = [result for other, result in found if other == name]
        if not results and name not in failed:
            continue
        holds = bool(results) and all(claim["holds"] for claim in results[0]["claims"])
        chosen = experiment(name)
        link = tag("a", chosen.title, href=f"#{name}")
        entries.append(tag("li", _mark(holds), " ", link, ". ", tag("span", chosen.claim, class_="meaning")))
    return tag("ol", *entries, class_="contents")


def _section(name: str, result: Mapping[str, Any], folder: Path) -> Html:
    chosen = experiment(name)
    return tag(
        "section",
        tag("h2", tag("a", chosen.title, href=f"#{name}")),
        tag("p", chosen.claim),
        *(_figure(folder, figure) for figure in result["figures"]),
        _claims(result["claims"]),
        tag("p", f"{chosen.reference}. Row {result['row']}, {result['seconds']:.0f} s.", class_="note"),
        id=name,
    )


def _figure(folder: Path, figure: Mapping[str, str]) -> Html:
    """The drawing itself is in the page."""
    svg = folder / f"{figure['name']}.svg"
    path, kind = (svg, "svg+xml") if svg.stat().st_size < MAX_SVG_BYTES else (svg.with_suffix(".png"), "png")
    data = b64encode(path.read_bytes()).decode()
    image = tag("img", src=f"data:image/{kind};base64,{data}", alt=figure["caption"], class_="drawing")
    return tag("figure", image, tag("figcaption", figure["caption"], class_="caption"))


def _claims(claims: Sequence[Mapping[str, Any]]) -> Html:
    """Claims that do not hold come first; the rest of a long list is folded."""
    ordered = sorted(claims, key=lambda claim: claim["holds"])
    shown = max(N_SHOWN, sum(not claim["holds"] for claim in claims))
    if len(ordered) <= shown + 2:
        return _table(ordered)
    rest = ordered[shown:]
    return join([_table(ordered[:shown]), folded(f"{len(rest)} more claims", _table(rest))])


def _table(claims: Sequence[Mapping[str, Any]]) -> Html:
    header = ["", "measured", "target", "known from", ""]
    rows = [
        [
            claim["text"],
            number(claim["measured"]),
            target_of(claim),
            tag("span", SOURCES[claim["source"]], class_="meaning"),
            _mark(claim["holds"]),
        ]
        for claim in claims
    ]
    return table(header, rows, "claims")


def _mark(holds: bool) -> Html:
    return tag("span", "holds" if holds else "fails", class_=f"mark {'holds' if holds else 'fails'}")


def _failure(name: str, folder: Path) -> Html:
    chosen = experiment(name)
    error = (folder / ERROR).read_text(encoding="utf-8")
    return tag(
        "section",
        tag("h2", chosen.title),
        tag("p", f"{chosen.claim} It ended with an error."),
        tag("pre", error),
        id=name,
    )


def _footer(results: Sequence[Mapping[str, Any]]) -> Html:
    if not results:
        return Html("")
    machines = " and ".join(dict.fromkeys(result["hardware"] for result in results))
    seeds = ", ".join(dict.fromkeys(str(result["seed"]) for result in results))
    sizes = " and ".join(dict.fromkeys("reduced sizes (--fast)" if one["fast"] else "full sizes" for one in results))
    seconds = sum(result["seconds"] for result in results)
    words = f"Seed {seeds}, {sizes}, {seconds:.0f} s of one core. {machines}."
    return tag("section", tag("p", words, class_="note"))
