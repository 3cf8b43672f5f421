"""What the report says, in order. A section that does not apply is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sae.metrics.ground_truth import FOUND
from sae.report import diagnosis, figures, keys, tables
from sae.report.data import MAX_SHOWN, Collection, Row, Run, by_setting
from sae.report.html import plot
from sae.report.tables import join_words
from toymodels.pages import Html, folded, grid, join, section, tag, text


def contents(collection: Collection) -> Html:
    """Every section of the report."""
    known = [run for run in collection.shown if run.truth is not None]
    first = collection.given[0]
    parts: list[Html | None] = [headline(collection), metrics(collection), meaning(first)]
    if known:
        parts.append(maps(collection, known))
    if any(run.knows_activations for run in known):
        parts.append(frequency(collection))
    several = len(collection.runs) > 1
    parts.append(diagnosis.lost_f1(first, several))
    parts += [curves(collection), density(collection)]
    if first.W_dec.shape[1] == 2:
        parts.append(plane(first))
    if first.truth is not None:
        parts.append(diagnosis.why_missed(first, several) or missed(collection, first))
    parts += [polysemanticity(first), dimensionality(first), configuration(collection)]
    return join(part for part in parts if part is not None)


def meaning(run: Run) -> Html | None:
    """What single units say about labelled classes."""
    if run.classes is None:
        return None
    reading = (
        "How well one unit alone tells a class from the others on unseen data (AUROC: 0.5 is chance, 1 is perfect). "
        "Each class's unit was chosen on training data; its number stands beside its score."
    )
    return section("What single units mean", reading, tables.class_table(run.classes))


def title(collection: Collection) -> str:
    """What the page is about, in one line."""
    if len(collection.given) > 1:
        return f"{len(collection.given)} dictionaries compared"
    run = collection.given[0]
    d_sae, d_in = run.W_dec.shape
    return f"{tables.method_name(run.config['sae']['kind'])}: {d_sae:,} latents in {d_in:,} dimensions"


def headline(collection: Collection) -> Html:
    """What was trained, and whether it found the truth."""
    run = collection.given[0]
    if len(collection.given) == 1:
        measure = scale(run) if run.truth is not None else ""
        parts = [tag("p", trained(run), class_="reading"), tag("p", verdict(run), class_="verdict"), measure]
    else:
        names = [tag("strong", each.name, ": ") for each in collection.given]
        said = [(trained(each), " ", verdict(each)) for each in collection.given]
        parts = [tag("p", name, *words) for name, words in zip(names, said, strict=True)]
    return tag("header", tag("h1", title(collection)), *parts)


def trained(run: Run) -> str:
    """One sentence from the configuration."""
    sae, train, source = (run.config.get(name) or {} for name in ("sae", "train", "source"))
    options = (sae.get("base") or {}) | {key: value for key, value in sae.items() if value is not None}
    shown = [key for key in ("k", "l0", "l1_coefficient") if options.get(key) is not None]
    setting = "".join(f", {key.replace('_', ' ')} = {options[key]:g}" for key in shown)
    amount = f"; {train['n_samples']:,} activations, seed {train['seed']}" if "n_samples" in train else ""
    name = f"{tables.method_name(sae['kind'])} with {len(run.W_dec):,} latents{setting}"
    start = f"; it began with the weights of {train['start_from']}" if train.get("start_from") else ""
    return f"{name}, trained on {_origin(run, source)}{amount}{start}."


def _origin(run: Run, source: Mapping[str, object]) -> str:
    """The activations, in words."""
    size = "features" if run.truth is None else "{:,} features in {:,} dimensions".format(*run.truth.shape)
    kind, path = source.get("kind"), source.get("path")
    known = {
        "toy": f"activations of a toy model that keeps {size}",
        "world": f"activations of the world {path}, which has {size}",
        "array": f"the activations in {path}",
        "store": f"the activations in the store {path}",
        "model": f"activations of {source.get('module')} in {source.get('model')}",
        None: "activations that were passed in from Python",
    }
    return known.get(kind if kind is None else str(kind), f"activations from the source {kind}")


def verdict(run: Run) -> Html:
    """Did it find the truth?"""
    fvu = run.result[tables.FVU]
    error = (
        f"leaves {fvu:.1%} of the variance unexplained"
        if fvu <= 1
        else f"reconstructs worse than the mean activation does (FVU {fvu:.4g})"
    )
    rest = f"It {error}, with {run.result[tables.L0]:.2f} latents firing at a time."
    if run.truth is None:
        return text(
            "The true features of these activations are not known: the report shows reconstruction and "
            f"sparsity only. {rest}"
        )
    n, found = len(run.truth), int((run.feature("matched_cosine") > FOUND).sum())
    mcc, chance = run.result[tables.MCC], run.result[f"{tables.MCC}_chance"]
    return join(
        [
            tag("strong", f"{found:,} of {n:,} true features have a latent of their own"),
            f"(cosine above {FOUND}). The mean matched cosine (MCC) is {mcc:.3f}, where a random dictionary "
            f"with as many latents scores {chance:.3f}. {rest}",
        ]
    )


def scale(run: Run) -> Html:
    """MCC from 0 to 1, with chance and the truth marked."""
    mcc, chance = run.result[tables.MCC], run.result[f"{tables.MCC}_chance"]
    limit = run.result.get(f"{tables.MCC}_truth", 1.0)
    marks = [
        _mark(chance, f"chance {chance:.3f}", ""),
        _mark(limit, f"the truth {limit:.3f}", "end"),
        _mark(mcc, f"MCC {mcc:.3f}", "run" if mcc < 0.95 else "run end"),
    ]
    bar = tag("div", class_="reach", style=f"width:{100 * min(max(mcc, 0), 1):.1f}%")
    label = f"MCC {mcc:.3f}, chance {chance:.3f}"
    return tag("div", tag("div", class_="track"), bar, *marks, class_="scale", role="img", aria_label=label)


def metrics(collection: Collection) -> Html:
    """Methods over seeds where there is a summary, the given runs beside each other, or one run in words; settings over
    seeds where several runs differ in their seed alone."""
    parts: list[Html] = []
    over: list[tuple[str, Sequence[Row]]] = []
    for summary in collection.summaries:
        methods = tables.by_method(summary)
        parts.append(tables.comparison_table(methods, "Methods"))
        over += methods
    settings = by_setting(collection.given)
    same = [([run.name for run in group], [run.result for run in group]) for group in settings]
    if any(len(group) > 1 for group in settings):
        over += [(join_words(names), group) for names, group in same]
        parts.append(tables.comparison_table([(_first(names), group) for names, group in same], "Settings over seeds"))
    if len(collection.given) > 1:
        rows = [(run.name, [run.result]) for run in collection.given]
        parts.append(tables.comparison_table(rows, "Runs"))
    elif not collection.summaries:
        parts.append(tables.score_table(collection.given[0]))
    for name, beside in collection.baselines.items():
        parts += _beside(name, beside, bool(collection.summaries))
    reading = "Measured on held-out activations."
    if collection.summaries:
        reading = "Each row is a method, mean ± standard deviation over its seeds."
    elif len(settings) < len(collection.given):
        reading = (
            "Above, each row is a setting, mean ± standard deviation over the runs that differ in their seed alone; "
            "below, each row is a run."
        )
    elif len(collection.given) > 1:
        reading = "Each row is a run."
    if collection.given[0].truth is not None:
        reading += (
            " A score of recovery means something only above its chance value, which random dictionaries "
            "with as many latents reach."
        )
    seeds = [
        folded(f"Every metric over the {len(group)} seeds of {name}", tables.seed_table(group, f"{name} over seeds"))
        for name, group in over
        if len(group) > 1
    ]
    every = [folded(f"Every metric of {run.name}", tables.every_metric(run)) for run in collection.given]
    return section("Final metrics", reading, *parts, *seeds, *every)


def _beside(name: str, rows: Sequence[Row], more: bool) -> list[Html]:
    """The baselines of one run, `more` where there is a table of methods that theirs adds to."""
    words = (
        f"What other methods find in the activations of {name}, one run each; where a method leaves the choice, with "
        "as many latents, of which as many fire."
    )
    words += " What the first table has already is not repeated." if more else ""
    return [
        tag("h3", f"{'Further baselines' if more else 'Baselines'} beside {name}"),
        tag("p", words, class_="reading"),
        tables.comparison_table(tables.by_method(rows), f"Baselines beside {name}"),
    ]


def _first(names: Sequence[str]) -> str:
    """A setting is called by its first run."""
    return names[0] if len(names) == 1 else f"{names[0]} and its other seeds"


def _mcc(run: Run) -> str:
    """Beside chance, where that was drawn."""
    chance = run.result.get(f"{tables.MCC}_chance")
    return f"MCC {run.result[tables.MCC]:.3f}" + ("" if chance is None else f", chance {chance:.3f}")


def maps(collection: Collection, known: list[Run]) -> Html:
    """Features against neurons, and against the latents of each run."""
    first = known[0]
    reading = (
        "Each row is a true feature, each column a unit, each cell their cosine. Neurons mix many features; "
        "a dictionary that found the truth shows one diagonal, a latent for each feature, once its latents "
        "are put in the order of the match. Random directions, matched alike, show a fainter one: the MCC beside that "
        "of chance says how much was found."
    )
    shown = len(figures.shown_features(first))
    n = len(first.order)
    thinned = f" {shown:,} of {n:,} features are drawn, at even distances." if shown < n else ""
    words = "Rows go from frequent features to rare ones; unmatched latents stand at the right."
    order = tag("p", words, thinned, class_="note")
    before = plot(figures.neuron_map(first), "Before: features × neurons", "Every column is a mixture", "square")
    after = [
        plot(
            figures.latent_map(run),
            f"After: features × latents of {_label(collection, run)} ({_mcc(run)})",
            f"Cosines after matching, {_mcc(run)}",
            "square",
        )
        for run in known
    ]
    if len(after) == 2:
        pictures = [grid(before, *after, columns=3)]
    else:
        pictures = [grid(before, after[0], columns=2)]
        pictures += [grid(*after[1:], columns=3)] if after[1:] else []
    return section("Before and after", reading, _ramp(), *pictures, order, _left_out(collection))


def frequency(collection: Collection) -> Html:
    """Recovery of each feature against how often it fires."""
    reading = "Each point is a true feature; a dictionary that sees frequent features only falls off to the left."
    cosine = figures.frequency(collection, "matched_cosine", "matched cosine")
    f1 = figures.frequency(collection, "f1", "F1")
    pictures = [
        plot(cosine, "Direction", "Matched cosine against frequency"),
        plot(f1, "Firing", "F1 against frequency"),
    ]
    first = next(run for run in collection.shown if run.knows_activations)
    whose = join([", ", _label(collection, first)]) if len(collection.shown) > 1 else ""
    tenths = tag("p", "Means over tenths of the features, from rare to frequent", whose, ":")
    return section(
        "Recovery against frequency",
        reading,
        _key(collection, keys.dots),
        grid(*pictures, columns=2),
        tenths,
        tables.decile_table(first),
    )


def curves(collection: Collection) -> Html:
    """Loss, L0 and, where the truth is known, MCC."""
    first = collection.given[0]
    reading = (
        "One line a run, over the steps of training. The loss includes the sparsity penalty: compare it "
        "within a method only."
    )
    loss = figures.curves(collection, "losses/overall_loss", "loss", log=True)
    l0 = figures.curves(collection, "metrics/l0", "L0", log=True)
    pictures = [
        plot(loss, "Loss", "Loss over training"),
        plot(l0, "L0: latents firing at a time", "L0 over training"),
    ]
    if any(run.truth is not None for run in collection.runs):
        chance = first.result.get(f"{tables.MCC}_chance")
        figure = figures.curves(collection, "recovery/mcc", "MCC", log=False, chance=chance)
        pictures.append(plot(figure, "MCC: recovery of the truth", "MCC over training"))
    return section("Training", reading, _key(collection), grid(*pictures, columns=len(pictures)))


def density(collection: Collection) -> Html:
    """How often latents fire."""
    reading = (
        "How many latents fire how often: a bump near the features' own frequency is healthy, mass at the "
        "right is dense, at the far left nearly dead."
    )
    never = [(_label(collection, run), run.tables["latent/frequency"]) for run in collection.shown]
    counts = "; ".join(f"{name}: {int((fired == 0).sum()):,} of {len(fired):,}" for name, fired in never)
    note = tag("p", f"Latents that never fire have no place on this axis: {counts}.", class_="note")
    picture = plot(figures.density(collection), "", "Histogram of firing frequencies")
    return section("Firing density", reading, _key(collection), picture, note)


def plane(run: Run) -> Html:
    """Truth and decoder as arrows, where there are two dimensions."""
    reading = "Directions at length 1: where a thin arrow (a latent) lies on a thick one, it found a feature."
    picture = plot(figures.plane(run), "", "Arrows of features and latents", "square")
    return section("Geometry", reading, picture)


def missed(collection: Collection, run: Run) -> Html:
    """The features without a latent, and what lies near them."""
    several = f" They are those of {run.name}." if len(collection.runs) > 1 else ""
    reading = f"Features without a latent of their own (cosine above {FOUND}), and what lies near them.{several}"
    return section("Missed features", reading, tables.missed_table(run))


def polysemanticity(run: Run) -> Html | None:
    """Features per unit, for neurons and for latents."""
    before = tables.neurons_of(run)
    found = tables.unit_table(run)
    reading = (
        f"How many features one unit stands for, measured alike for the {before} that the dictionary reads and "
        "for its latents. Purity by chance is high, as noise passes for one or two features: read it with "
        "selectivity."
    )
    if found is None:
        return None
    return section("Polysemanticity, before and after", reading, found, diagnosis.units(run, before) or "")


def dimensionality(run: Run) -> Html | None:
    """The geometry of the dictionary beside the truth's."""
    found = tables.geometry_table(run)
    reading = "How directions share the space: a dictionary that found the truth has the truth's geometry."
    return None if found is None else section("Dimensionality", reading, found, diagnosis.geometry(run) or "")


def configuration(collection: Collection) -> Html:
    """Each run's configuration, folded."""
    command = tag("code", "sae train FILE")
    reading = join(["What a run depends on, defaults included: saved as a file,", command, "repeats it."])
    runs = dict.fromkeys([*collection.given, *collection.shown])
    parts = [folded(run.name, tag("pre", run.config_text)) for run in runs]
    return section("Configuration", reading, *parts)


def _mark(place: float, words: str, kind: str) -> Html:
    return tag("div", tag("span", words), class_=f"mark {kind}", style=f"left:{100 * min(max(place, 0), 1):.1f}%")


def _label(collection: Collection, run: Run) -> str:
    return tables.method_name(run.method) if collection.siblings else run.name


def _key(collection: Collection, look: Callable[[Sequence[str]], Html] = keys.lines) -> Html:
    """Which line or marker is which method's, where there are several."""
    several = len(collection.methods) > 1
    return look([tables.method_name(method) for method in collection.methods]) if several else Html("")


def _ramp() -> Html:
    ends = ("cosine −1", tag("i"), "1")
    return tag("div", *ends, class_="ramp", role="img", aria_label="Colours of cosines from −1 to 1")


def _left_out(collection: Collection) -> Html:
    more = len(collection.methods) - MAX_SHOWN
    words = f"{more} further methods are in the tables and curves only."
    return tag("p", words, class_="note") if more > 0 else Html("")
