"""The tables: scores of runs and methods, missed features, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sae.report.data import Row, Run
from sae.report.html import Html, join, table, tag

MAX_MISSED = 30


class Score(NamedTuple):
    key: str
    name: str
    form: str
    meaning: str


MCC, FVU, L0, DEAD = "recovery/mcc", "metrics/fvu", "metrics/l0", "metrics/dead"
SCORES = (
    Score(MCC, "MCC", ".3f", "mean cosine of a feature with its own latent, matched one to one"),
    Score("recovery/mmcs", "MMCS", ".3f", "mean cosine of a feature with its nearest latent"),
    Score("recovery/coverage_0.9", "coverage", ".3f", "share of features whose own latent has a cosine above 0.9"),
    Score("recovery/f1", "F1", ".3f", "agreement on when a feature fires, mean over features"),
    Score(FVU, "FVU", ".4f", "share of the variance that the reconstruction misses"),
    Score(L0, "L0", ".2f", "latents that fire for one activation, on average"),
    Score(DEAD, "dead", ".1%", "share of latents that never fire"),
    Score("seconds", "seconds", ".1f", "time to train"),
)
METHODS = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "relu": "ReLU, L1 penalty",
    "l1": "L1",
    "l1_low": "L1, penalty too low",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "matryoshka": "Matryoshka",
    "random": "random dictionary",
    "oracle": "oracle: true dictionary",
    "oracle_k": "oracle, same k",
    "pca": "PCA",
    "ica": "ICA",
    "nmf": "NMF",
    "dictionary_learning": "dictionary learning",
}


UNIT_MEASURES = {
    "purity": ("purity", "largest share that one feature has in a unit; 1 is monosemantic"),
    "features_per_unit": ("features per unit", "effective number of features in a unit; 1 is monosemantic"),
    "selectivity": ("selectivity", "how much of a unit's firing its best feature explains; 1 is all of it"),
}
GEOMETRY_MEASURES = {
    "feature_dimensionality": ("feature dimensionality", "dimensions that a direction has to itself, on average"),
    "dimensions_per_feature": ("dimensions per feature", "width of the space over the squared norm of the dictionary"),
    "interference": ("interference", "squared overlap of a direction with all the others"),
    "capacity": ("capacity", "sum of the feature dimensionalities; at most the width of the space"),
    "effective_rank": ("effective rank", "dimensions in use, by the entropy of the spectrum"),
    "participation_ratio": ("participation ratio", "dimensions in use, by the squares of the spectrum"),
    "coherence_over_welch": ("coherence / Welch", "largest overlap over the smallest that is possible"),
    "rms_over_welch": ("rms / Welch", "typical overlap over the smallest that is possible"),
}


def method_name(method: str) -> str:
    """What a reader calls a method; a run's own name stays."""
    return METHODS.get(method, method)


def score_table(run: Run) -> Html:
    """One run: each score beside its value by chance, its limit, and its meaning."""
    rows = []
    for score in SCORES:
        if score.key in run.result:
            chance = _value(run.result, f"{score.key}_chance", score.form, run.result.get(f"{score.key}_chance_sd"))
            limit = _value(run.result, f"{score.key}_truth", score.form)
            meaning = tag("span", score.meaning, class_="meaning")
            rows.append([score.name, _value(run.result, score.key, score.form), chance, limit, meaning])
    return table(["", "this run", "by chance", "the truth", ""], rows, "Final metrics")


def comparison_table(rows: Sequence[tuple[str, Sequence[Row]]], label: str) -> Html:
    """A row a method: mean ± sd over its seeds, the chance value of MCC, and MCC as a bar on which chance is a tick."""
    scores = [score for score in SCORES if any(score.key in row for _, group in rows for row in group)]
    seeds = any(len(group) > 1 for _, group in rows)
    header = ["", *(["seeds"] if seeds else [])]
    for score in scores:
        header += ["MCC", "by chance", ""] if score.key == MCC else [score.name]
    body = []
    for name, group in rows:
        cells: list[object] = [name, *([len(group)] if seeds else [])]
        for score in scores:
            cells.append(_spread(group, score))
            if score.key == MCC:
                chance = _mean(group, f"{MCC}_chance")
                cells += [_number(chance, score.form), _bar(_mean(group, MCC), chance)]
        body.append(cells)
    return table(header, body, label)


def by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of a summary, those of one method together, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return [(method_name(method), group) for method, group in groups.items()]


def missed_table(run: Run) -> Html:
    """The features that no latent stands for, from frequent to rare."""
    missed = [i for i, found in enumerate(run.feature("found").tolist()) if not found]
    missed.sort(key=lambda i: -run.feature("frequency")[i])
    if not missed:
        n = len(run.feature("found"))
        return tag("p", f"None is missed: each of the {n} features has a latent of its own with a cosine above 0.9.")
    rows = [
        [
            f"feature {i}",
            f"{run.feature('frequency')[i]:.2%}",
            f"{run.feature('magnitude')[i]:.3f}",
            _number(run.feature("matched_cosine")[i], ".3f"),
            _neighbour(run, i, "nearest_feature"),
            _neighbour(run, i, "nearest_latent"),
        ]
        for i in missed[:MAX_MISSED]
    ]
    header = ["", "frequency", "magnitude", "matched cosine", "nearest other feature", "nearest latent"]
    count = f"{len(missed)} of {len(run.feature('found'))} features are missed"
    count += f"; the {MAX_MISSED} most frequent of them are listed." if len(missed) > MAX_MISSED else "."
    return join([tag("p", count), table(header, rows, "Missed features")])


def every_metric(run: Run) -> Html:
    """The whole of result.json."""
    rows = [[key, _number(value, ".6g")] for key, value in sorted(run.result.items())]
    return table(["", "value"], rows, "Every metric")


def _neighbour(run: Run, i: int, name: str) -> str:
    index = int(run.feature(name)[i])
    return "–" if index < 0 else f"{index}, cosine {run.feature(f'{name}_cosine')[i]:.3f}"


def _mean(group: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in group if row.get(key) is not None]
    return fmean(values) if values else None


def _spread(group: Sequence[Row], score: Score) -> Html:
    values = [row[score.key] for row in group if row.get(score.key) is not None]
    return _number(fmean(values) if values else None, score.form, stdev(values) if len(values) > 1 else None)


def _value(result: Mapping[str, Any], key: str, form: str, sd: float | None = None) -> Html:
    return _number(result.get(key), form, sd)


def _number(value: float | None, form: str, sd: float | None = None) -> Html:
    if value is None:
        return Html("")
    spread = "" if sd is None else tag("span", f" ± {sd:{form}}", class_="sd")
    return Html(f"{value:{form}}{spread}".replace("-", "−"))


def _bar(value: float | None, chance: float | None) -> Html:
    if value is None:
        return Html("")
    reach = tag("i", style=f"width:{100 * min(max(value, 0), 1):.1f}%")
    tick = "" if chance is None else tag("b", style=f"left:{100 * chance:.1f}%")
    return tag("span", reach, tick, class_="bar", aria_hidden="true")


def unit_table(run: Run) -> Html | None:
    """Polysemanticity before and after: `polysemanticity/<units>/<measure>`; None when nothing was measured."""
    columns = {"neurons": "neurons (before)", "hidden": "hidden units (before)", "latents": "latents (after)"}
    prefix = "polysemanticity"
    units = [name for name in columns if any(key.startswith(f"{prefix}/{name}/") for key in run.result)]
    if not units:
        return None
    rows = []
    for measure, (name, meaning) in UNIT_MEASURES.items():
        cells = [_value(run.result, f"{prefix}/{unit}/{measure}", ".3g") for unit in units]
        beside = [_value(run.result, f"{prefix}/{units[-1]}/{measure}_{what}", ".3g") for what in ("chance", "truth")]
        rows.append([name, *cells, *beside, tag("span", meaning, class_="meaning")])
    header = ["", *(columns[unit] for unit in units), "by chance", "the truth", ""]
    return table(header, rows, "Polysemanticity before and after")


def geometry_table(run: Run) -> Html | None:
    """The geometry of W_dec beside that of the truth: `dimensionality/<measure>`."""
    prefix = "dimensionality"
    rows = []
    for measure, (name, meaning) in GEOMETRY_MEASURES.items():
        key = f"{prefix}/{measure}"
        if key in run.result:
            cells = [_value(run.result, f"{key}{what}", ".4g") for what in ("", "_truth", "_difference", "_chance")]
            rows.append([name, *cells, tag("span", meaning, class_="meaning")])
    if not rows:
        return None
    return table(["", "latents", "the truth", "difference", "by chance", ""], rows, "Dimensionality")
