"""What the report says of a diagnosis: where the F1 went, and which features are missed and why."""

from __future__ import annotations

from typing import Any

from sae.metrics.ground_truth import FOUND
from sae.report import diagnosis_figures as figures
from sae.report import keys
from sae.report.data import Run
from sae.report.html import plot
from toymodels.pages import Html, grid, join, section, table, tag

MAX_OF_A_REASON = 5
CODERS = (
    ("", "SAE"),
    ("_learned_coded", "its dictionary, sparse coding"),
    ("_small_truth_coded", "true features, as many as latents are alive"),
    ("_truth_coded", "all true features, sparse coding"),
)
GAPS = (
    ("unreachable", "unreachable", "even the true dictionary, with the best codes, does not say this"),
    ("dictionary_gap", "dictionary gap", "what the learned dictionary loses to the true one, both with the best codes"),
    (
        "size_gap",
        "of which too few latents",
        "there are fewer latents alive than features; the strongest would be kept",
    ),
    ("amortisation_gap", "amortisation gap", "what the encoder loses to the best codes of its own dictionary"),
    ("threshold_gap", "of which threshold", "another firing threshold for all latents would be enough"),
)
PREDICTOR_NOTE = (
    "A reason is a label; whether a property predicts being missed is another question. Differences in points, with "
    "95 % intervals. At like frequency: between features of one decile of frequency, as parents fire more often than "
    "their children."
)


def lost_f1(run: Run, several: bool) -> Html | None:
    """From the SAE's F1 to 1, step by step; of one run, which is named where there are several."""
    if run.diagnosis is None:
        return None
    reading = (
        "From the F1 of the SAE to 1. Sparse coding finds the best codes of a dictionary, so what it gains over the "
        "SAE is the encoder's loss, and what the true dictionary gains over the learned one is the dictionary's. "
        "Limited: each activation gets as many codes as the SAE uses for it, so that a budget is not taken for a fault."
    ) + _of(run, several)
    pictures = [
        plot(figures.waterfall(run, ""), "Sparse coding, free", "F1 from the SAE to 1, step by step"),
        plot(figures.waterfall(run, "_k"), "Limited to the SAE's own L0", "The same with a limited number of codes"),
    ]
    coded, chosen = run.diagnosis["n_coded"], run.diagnosis["n_validation"]
    note = (
        f"On {coded:,} held-out activations; penalty and threshold are those of highest F1 on {chosen:,} others. F1 is "
        "the mean over features; ± one standard error, by a jackknife over blocks of activations."
    )
    return section(
        "Where the F1 went",
        reading,
        grid(*pictures, columns=2),
        _coders(run),
        _gaps(run),
        tag("p", note, class_="note"),
    )


def _of(run: Run, several: bool) -> str:
    return f" This is {run.name}." if several else ""


def _coders(run: Run) -> Html:
    """F1, R², FVU and L0 of each way to codes."""
    measures = ("f1", "r2", "fvu", "l0")
    rows = []
    for coder, name in CODERS:
        if f"diagnosis/f1{coder}" not in run.result:
            continue
        cells: list[object] = [name]
        for limit in ("", "_k"):
            # The SAE's own codes are as they are.
            keys = [f"diagnosis/{measure}{coder}{limit if coder else ''}" for measure in measures]
            cells += (
                [f"{run.result[key]:.{2 if 'l0' in key else 3}f}" for key in keys] if coder or not limit else [""] * 4
            )
        rows.append(cells)
    names = ["F1", "R²", "FVU", "L0"]
    return table(["", *names, *(f"{name}, limited" for name in names)], rows, "Ways to codes")


def _gaps(run: Run) -> Html:
    rows = []
    for gap, name, meaning in GAPS:
        free = f"diagnosis/{gap}"
        if free not in run.result:
            continue
        limited = f"{free}_k" if f"{free}_k" in run.result else free
        numbers = [_with_error(run.result[key], run.result[f"{key}_se"]) for key in (free, limited)]
        rows.append([name, *numbers, tag("span", meaning, class_="meaning")])
    return table(["lost F1", "free", "limited", ""], rows, "Lost F1")


def why_missed(run: Run, several: bool) -> Html | None:
    """Which features are missed, why, and what predicts it; of one run, which is named where there are several."""
    if run.diagnosis is None:
        return None
    n, missed = len(run.diagnosis["features"]), int(run.result["diagnosis/missed"])
    misread = int(run.result["diagnosis/misread"])
    count = f"{missed:,} of {n:,} features are missed; {misread:,} more are found, and read with an F1 below 0.5."
    reading = (
        f"A feature is missed when its own latent has a cosine of at most {FOUND} to it. What a latent is made of is "
        "found by sparse coding of its direction with the true features; the reason is the first rule that holds of "
        f"the latent which carries most of the feature. Trees and exclusive groups are {run.diagnosis['structure']}."
    ) + _of(run, several)
    if not missed:
        return section("Missed features, and why", reading, tag("p", count))
    pictures = [
        plot(figures.reason_bars(run), "Reasons", "Number of missed features by reason"),
        plot(figures.reason_points(run), "Who is missed", "Matched cosine against frequency, by reason"),
    ]
    rates = plot(figures.predictors(run), "What predicts it", "Share missed with and without each property")
    return section(
        "Missed features, and why",
        reading,
        tag("p", count),
        grid(*pictures, columns=2),
        _reasons(run),
        _dots(),
        grid(rates, columns=1),
        _predictors(run),
        tag("p", PREDICTOR_NOTE, class_="note"),
        _listed(run),
    )


def _reasons(run: Run) -> Html:
    """Reasons, and of how many missed and found features their conditions hold."""
    missed = run.result["diagnosis/missed"]
    rows = [
        [
            reason["means"],
            f"{reason['n']:,}",
            f"{reason['n'] / missed:.1%}",
            f"{reason['holds_of_missed']:.1%}",
            f"{reason['holds_of_found']:.1%}",
        ]
        for reason in figures.reasons_by_count(run)
    ]
    return table(["reason", "features", "of the missed", "holds of missed", "holds of found"], rows, "Reasons")


def _predictors(run: Run) -> Html:
    assert run.diagnosis is not None
    rows = []
    for row in run.diagnosis["predictors"]:
        like = row["same_frequency"]
        rows.append(
            [
                row["name"],
                f"{row['n']:,}",
                f"{row['missed_with']:.1%}",
                f"{row['missed_without']:.1%}",
                _points(row["difference"]),
                f"{_points(row['low'])} … {_points(row['high'])}",
                "" if like is None else _points(like),
            ]
        )
    header = ["property", "features", "missed with", "missed without", "difference", "interval", "at like frequency"]
    return table(header, rows, "What predicts being missed")


def _listed(run: Run) -> Html:
    """The most frequent features of each reason."""
    assert run.diagnosis is not None
    rows: list[list[object]] = []
    for reason in figures.reasons_by_count(run):
        own = [row for row in run.diagnosis["features"] if row["reason"] == reason["name"]]
        own.sort(key=lambda row: -float(row["frequency"]))
        rows += [_row(row, reason["means"]) for row in own[:MAX_OF_A_REASON]]
    header = [
        *("feature", "reason", "its carrier holds", "role", "frequency", "magnitude", "F1", "matched latent"),
        *("fires with", "nearest feature"),
    ]
    note = (
        f"The {MAX_OF_A_REASON} most frequent features of each reason. A carrier is the latent that holds most of a "
        "feature, and is made of features × shares. Every feature has a row in features.csv."
    )
    return join([table(header, rows, "Missed features"), tag("p", note, class_="note")])


def _row(row: dict[str, str], reason: str) -> list[object]:
    """One feature."""
    return [
        row["feature"],
        tag("span", reason, class_="meaning"),
        _words(*(part.replace(":", " × ") for part in row["carrier_holds"].split()[:3] or ["no carrier"])),
        _words(_role(row)),
        f"{float(row['frequency']):.2%}",
        f"{float(row['magnitude']):.2f}",
        f"{float(row['f1']):.2f}",
        _other(row["matched_latent"], f"cosine {float(row['matched_cosine']):z.2f}", ""),
        _other(row["partner"], f"φ {float(row['partner_phi']):.2f}".replace("-", "−"), row["partner_is"]),
        _other(row["nearest_feature"], f"cosine {float(row['nearest_feature_cosine']):z.2f}", ""),
    ]


def _role(row: dict[str, str]) -> str:
    """Parent, child, member of an exclusive group."""
    roles = []
    if int(row["n_children"]):
        roles.append("exclusive parent" if int(row["exclusive_children"]) else "parent")
    if int(row["parent"]) >= 0:
        roles.append("exclusive child" if int(row["exclusive_group"]) >= 0 else "child")
    elif int(row["exclusive_group"]) >= 0:
        roles.append("exclusive")
    return ", ".join(roles) or "–"


def _other(index: str, value: str, what: str) -> Html:
    if int(index) < 0:
        return _words("none")
    return _words(f"{index} ({what})" if what and what != "other" else index, value)


def _words(*parts: str) -> Html:
    """A cell that may go on in the next line after each of its parts."""
    return tag("span", ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts), class_="words")


def units(run: Run, before: str) -> Html | None:
    """How features per unit are distributed, for neurons and for latents."""
    if run.diagnosis is None:
        return None
    pictures = [
        plot(
            figures.unit_curves(run, "features_per_unit", "features per unit", True, before),
            "Features per unit",
            "Share of units with at most so many features",
        ),
        plot(figures.unit_curves(run, "purity", "purity", False, before), "Purity", "Share of units up to a purity"),
    ]
    key = keys.lines([before, "latents"])
    return join([key, grid(*pictures, columns=2)])


def geometry(run: Run) -> Html | None:
    """How D_i and the spectrum are distributed, for latents and for the truth."""
    if run.truth is None or not (run.tables["latent/frequency"] > 0).any():
        return None
    pictures = [
        plot(figures.dimension_curves(run), "Feature dimensionality", "Share of directions up to a dimensionality"),
        plot(figures.spectrum(run), "Spectrum", "Share of the variance along each principal direction"),
    ]
    key = keys.lines(["true features", "latents"])
    return join([key, grid(*pictures, columns=2)])


def _dots() -> Html:
    """Which point is which."""
    looks = (
        ("features with the property", "var(--series-0)", "var(--series-0)"),
        ("without it", "none", "var(--muted)"),
    )
    items = []
    for name, fill, stroke in looks:
        circle = tag("circle", cx=5, cy=5, r=3.6, style=f"fill:{fill};stroke:{stroke};stroke-width:1.6")
        items.append(tag("li", tag("svg", circle, viewBox="0 0 10 10", class_="dot", aria_hidden="true"), name))
    return tag("ul", *items, class_="key")


def _with_error(value: float, error: float) -> Html:
    number = f"{value:z.3f}".replace("-", "−")
    return Html(number + tag("span", f" ± {error:.3f}", class_="sd"))


def _points(value: Any) -> str:
    """Percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")
