"""The tables: scores of runs and methods, missed features, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import fmean, stdev

from sae.metrics.ground_truth import FOUND
from sae.metrics.seeds import over_seeds
from sae.report.data import Row, Run
from sae.scores import CE, COVERAGE, DEAD, F1, FVU, KL, L0, MCC, MMCS, SECONDS, Score, scores
from toymodels.pages import Html, join, table, tag, text

MAX_MISSED = 30
# Numbers from here on are of a run that went wrong: their digits say nothing.
TOO_LONG = 1e6
# Of a column of bars, which narrow pages leave out as a whole.
NO_BAR = tag("span", class_="no-bar")

SCORES = scores(MCC, MMCS, COVERAGE, F1, FVU, L0, DEAD, CE, KL, SECONDS)
METHODS = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "relu": "ReLU",
    "l1": "L1",
    "l1_low": "L1, penalty too low",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "matryoshka": "Matryoshka",
    "refined": "Refined",
    "lista_matryoshka": "LISTA-Matryoshka",
    "transcoder": "Transcoder",
    "skip_transcoder": "Skip transcoder",
    "random": "random dictionary",
    "oracle": "oracle: true dictionary",
    "oracle_k": "oracle, same k",
    "topk_oracle": "TopK's dictionary, sparse coding",
    "pca": "PCA",
    "ica": "ICA",
    "semi_nmf": "semi-NMF",
    "dictionary_learning": "dictionary learning",
    "ksvd": "K-SVD",
    "data_points": "activations as dictionary",
    "sae_oracle": "its dictionary, sparse coding",
    "sae_pursuit": "its dictionary, matching pursuit",
    "oracle_pursuit": "true dictionary, matching pursuit",
    "p_annealing": "p-annealing",
    "matching_pursuit": "matching pursuit",
}


MISSED_COLUMNS = (
    ("frequency", "frequency", ".2%"),
    ("magnitude", "magnitude", ".3f"),
    ("matched_cosine", "matched cosine", ".3f"),
    ("nearest_feature", "nearest other feature", None),
    ("nearest_latent", "nearest latent", None),
)
UNIT_MEASURES = {
    "purity": ("purity", ".3f", "largest share of one feature; 1 is monosemantic"),
    "features_per_unit": (
        "features per unit",
        ".2f",
        "effective number of features; 1 is monosemantic",
    ),
    "selectivity": (
        "selectivity",
        ".3f",
        "share of its firing that its best feature explains",
    ),
}
GEOMETRY_MEASURES = {
    "feature_dimensionality": ("feature dimensionality", "dimensions that a direction has to itself"),
    "dimensions_per_feature": (
        "dimensions per feature",
        "width of the space over the dictionary's squared norm",
    ),
    "interference": ("interference", "squared overlap of a direction with all the others"),
    "capacity": ("capacity", "sum of the feature dimensionalities; at most the width of the space"),
    "effective_rank": ("effective rank", "dimensions in use, by the entropy of the spectrum"),
    "participation_ratio": ("participation ratio", "dimensions in use, by the squares of the spectrum"),
    "coherence_over_welch": ("coherence / Welch", "largest overlap over the smallest that is possible"),
    "rms_over_welch": ("rms / Welch", "typical overlap over the smallest that is possible"),
}


def join_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def method_name(method: str) -> str:
    """What a reader calls a method; a run's own name stays."""
    return METHODS.get(method, method)


def score_table(run: Run) -> Html:
    """One run: each score beside its value by chance, its limit, and its meaning."""
    beside = {"": "this run", "_chance": "by chance", "_truth": "the truth"}
    shown = [score for score in SCORES if score.key in run.result]
    columns = [what for what in beside if any(f"{score.key}{what}" in run.result for score in shown)]
    rows = [
        [
            score.name,
            *(_value(run, f"{score.key}{what}", score.form) for what in columns),
            _meaning(score.meaning),
        ]
        for score in shown
    ]
    return table(["", *(beside[what] for what in columns), ""], rows, "Final metrics")


def comparison_table(rows: Sequence[tuple[str, Sequence[Row]]], label: str) -> Html:
    """A row a method: mean ± sd over its seeds; chance stands beside MCC, and is a tick on its bar."""
    shown = [score for score in SCORES if any(score.key in row for _, group in rows for row in group)]
    seeds = any(len(group) > 1 for _, group in rows)
    header: list[object] = ["", *(["seeds"] if seeds else [])]
    for score in shown:
        header += ["MCC", "by chance", NO_BAR] if score.key == MCC else [score.name]
    body = []
    for name, group in rows:
        cells: list[object] = [name, *([len(group)] if seeds else [])]
        for score in shown:
            cells.append(_spread(group, score))
            if score.key == MCC:
                chance = _mean(group, f"{MCC}_chance")
                cells += [number(chance, score.form), _bar(_mean(group, MCC), chance)]
        body.append(cells)
    return table(header, body, label)


def seed_table(group: Sequence[Row], label: str) -> Html:
    """Every metric over the seeds of one setting: mean, 95 % interval, standard deviation, number of seeds."""
    numbers = [
        {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "seed"}
        for row in group
    ]
    rows = [
        [key, *(number(value, ".6g") for value in (found.mean, found.low, found.high, found.sd)), found.n]
        for key, found in sorted(over_seeds(numbers).items())
    ]
    return table(["", "mean", "95 % from", "to", "sd", "seeds"], rows, label)


def by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of a summary, those of one method together, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return [(method_name(method), group) for method, group in groups.items()]


def missed_table(run: Run) -> Html:
    """The features that no latent stands for, from frequent to rare."""
    n, found = len(run.order), run.feature("found")
    missed = [i for i in run.order.tolist() if not found[i]]
    if not missed:
        return tag("p", f"None is missed: each of the {n:,} features has a latent with a cosine above {FOUND}.")
    columns = [column for column in MISSED_COLUMNS if f"feature/{column[0]}" in run.tables]
    rows = [
        [f"feature {i}", *(_of_feature(run, i, name, form) for name, _, form in columns)] for i in missed[:MAX_MISSED]
    ]
    count = f"{len(missed):,} of {n:,} features are missed"
    count += f"; the first {MAX_MISSED} are listed." if len(missed) > MAX_MISSED else "."
    return join([tag("p", count), table(["", *(title for _, title, _ in columns)], rows, "Missed features")])


DECILE_COLUMNS = (
    ("n_features", "features", ".0f"),
    ("frequency", "frequency", ".3%"),
    ("mcc", "MCC", ".3f"),
    ("coverage_0.9", "coverage", ".3f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("f1", "F1", ".3f"),
    ("auroc", "AUROC", ".3f"),
    ("r2", "R²", ".3f"),
)


def decile_table(run: Run) -> Html:
    """Tenths of the true features, from rare to frequent."""
    found = run.deciles()
    rows = [
        [f"{number + 1}", *(format(float(found[name][number]), form) for name, _, form in DECILE_COLUMNS)]
        for number in range(len(found["frequency"]))
    ]
    return table(["tenth", *(title for _, title, _ in DECILE_COLUMNS)], rows, "Recovery by tenths of frequency")


def class_table(classes: dict[str, list[dict[str, float]]]) -> Html:
    """A row for each class, a column for each sort of unit, and their means."""
    rows: list[list[object]] = []
    for same in zip(*classes.values(), strict=True):
        best = max(unit["auroc"] for unit in same)
        cells = [tag("strong" if unit["auroc"] == best else "span", f"{unit['auroc']:.3f}") for unit in same]
        rows.append(
            [
                f"class {same[0]['class']}",
                *(join([cell, f" #{unit['unit']}"]) for cell, unit in zip(cells, same, strict=True)),
            ]
        )
    rows.append(["mean", *(f"{sum(unit['auroc'] for unit in units) / len(units):.3f}" for units in classes.values())])
    return table(["", *(f"best {name}" for name in classes)], rows, "Best single unit of each class")


def every_metric(run: Run) -> Html:
    """The whole of result.json."""
    rows = [[key, number(value, ".6g")] for key, value in sorted(run.result.items())]
    return table(["", "value"], rows, "Every metric")


def unit_table(run: Run) -> Html | None:
    """Polysemanticity before and after: `polysemanticity/<unit>_<measure>`; None when it was not measured."""
    prefix = "polysemanticity"
    if f"{prefix}/latent_purity" not in run.result:
        return None
    rows = []
    for measure, (name, form, meaning) in UNIT_MEASURES.items():
        both = [f"{unit}_{measure}{what}" for unit in ("neuron", "latent") for what in ("", "_chance")]
        cells = [_value(run, f"{prefix}/{key}", form) for key in (*both, f"latent_{measure}_truth")]
        rows.append([name, *cells, _meaning(meaning)])
    if "diagnosis/purity_weights_latent" in run.result:
        keys = ("neuron", None, "latent", "latent_chance", "latent_truth")
        cells = [_value(run, f"diagnosis/purity_weights_{key}", ".4f") if key else Html("") for key in keys]
        rows.append(["purity of weights", *cells, _meaning("largest share of one feature in its weights")])
    header = ["", f"{neurons_of(run)} (before)", "by chance", "latents (after)", "by chance", "the truth", ""]
    return table(header, rows, "Polysemanticity before and after")


def neurons_of(run: Run) -> str:
    """What the dimensions of the activations are."""
    toy = (run.config.get("source") or {}).get("kind") == "toy"
    return "hidden units of the toy model" if toy else "neurons"


def geometry_table(run: Run) -> Html | None:
    """The geometry of W_dec beside that of the truth: `dimensionality/<measure>`; None when not measured."""
    beside = {"": "latents", "_truth": "the truth", "_difference": "difference", "_chance": "by chance"}
    measured = {f"dimensionality/{measure}": words for measure, words in GEOMETRY_MEASURES.items()}
    measured = {key: words for key, words in measured.items() if key in run.result}
    columns = [what for what in beside if any(f"{key}{what}" in run.result for key in measured)]
    rows = [
        [name, *(_value(run, f"{key}{what}", ".3f") for what in columns), _meaning(meaning)]
        for key, (name, meaning) in measured.items()
    ]
    return table(["", *(beside[what] for what in columns), ""], rows, "Dimensionality") if rows else None


def _of_feature(run: Run, i: int, name: str, form: str | None) -> str:
    """A value of feature i, or (form None) its nearest other direction and their cosine."""
    if form is not None:
        return number(float(run.feature(name)[i]), form)
    index = int(run.feature(name)[i])
    return "none" if index < 0 else f"{index}, cosine {run.feature(f'{name}_cosine')[i]:.3f}"


def _mean(group: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in group if row.get(key) is not None]
    return fmean(values) if values else None


def _spread(group: Sequence[Row], score: Score) -> Html:
    values = [row[score.key] for row in group if row.get(score.key) is not None]
    return Html("–") if not values else number(fmean(values), score.form, stdev(values) if len(values) > 1 else None)


def _value(run: Run, key: str, form: str) -> Html:
    """A final metric, with its standard deviation where that is recorded."""
    return number(run.result.get(key), form, run.result.get(f"{key}_sd"))


def number(value: float | None, form: str, sd: float | None = None) -> Html:
    """A cell: a value with its standard deviation, where there are such."""
    if value is None:
        return Html("")
    form = ".2e" if form.endswith("f") and abs(value) >= TOO_LONG else form
    words = f"{value:z{form}}".replace("-", "−") if isfinite(value) else "undefined"
    return text(words) if sd is None else Html(words + tag("span", f" ± {sd:{form}}", class_="sd"))


def _bar(value: float | None, chance: float | None) -> Html:
    if value is None:
        return NO_BAR
    reach = tag("i", style=f"width:{100 * min(max(value, 0), 1):.1f}%")
    tick = "" if chance is None else tag("b", style=f"left:{100 * chance:.1f}%")
    return tag("span", reach, tick, class_="bar", aria_hidden="true")


def _meaning(words: str) -> Html:
    return tag("span", words, class_="meaning")
