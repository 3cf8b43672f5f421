"""Who takes part and what they share: a recipe, read from YAML, changed by flags, and made definite on a world."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from sae.baselines import BASELINES, applicable
from sae.config import EvaluationSection, LogSection, SAEConfig, SourceConfig, TrainSection, override
from sae.config_base import Section
from sae.config_text import config_path, explain, flags, read_yaml
from sae.errors import UsageError
from sae.sources import Source
from toymodels.errors import nearest
from toymodels.plain_yaml import parse_yaml

logger = logging.getLogger("sae")

L0 = "l0"
"""As the value of an option: the shared L0."""
N_L0 = 65_536
"""Held-out activations, none used for evaluation, on which the L0 of a world is counted."""
KEYS_OF_A_WORLD = {"n_features", "d_hidden"}


class Recipe(Section):
    """What `configs/leaderboard.yaml` says, with the world in place of its path."""

    source: SerializeAsAny[SourceConfig]
    """The world."""
    seeds: int = Field(default=3, gt=0)
    """Number of seeds of the initial weights, counted from 0."""
    d_sae: int | None = Field(default=None, gt=0)
    """Latents of every SAE; default the number of true features."""
    l0: float | None = Field(default=None, gt=0)
    """Mean number of latents that fire for one activation; default that of the true features."""
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    log: LogSection = LogSection()
    entries: list[dict[str, Any]] = Field(default=[])
    """SAEs: each a kind with its options, and a name where two are of one kind."""
    baselines: list[str] = Field(default=[])

    @field_validator("source", mode="before")
    @classmethod
    def _source_kind(cls, value: Any) -> Any:
        return SourceConfig.of_kind(value)

    @field_validator("train")
    @classmethod
    def _seeds_vary(cls, train: TrainSection) -> TrainSection:
        if "seed" in train.model_fields_set and train.seed:
            raise ValueError(f"seed={train.seed} is what varies; leave it out, and set the number of seeds with seeds")
        return train.model_copy(update={"data_seed": train.data_seed or 0})

    @field_validator("entries")
    @classmethod
    def _entries_have_kinds(cls, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for entry in entries:
            if not isinstance(entry.get("kind"), str):
                raise ValueError(f"an entry needs a kind, as in {{kind: topk, k: l0}}, got {entry}")
            if "d_sae" in entry:
                raise ValueError(
                    f"d_sae={entry['d_sae']} of {entry['kind']}: it is the same for all; set it with --d_sae"
                )
            name = entry.get("name", entry["kind"])
            if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"the name of an entry is letters, digits and . + - _, got {name!r}")
            if name in BASELINES:
                raise ValueError(f"an entry is called {name!r}, which is a baseline; give it another name")
        return entries

    @field_validator("baselines")
    @classmethod
    def _baselines_are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in BASELINES:
                raise ValueError(f"unknown baseline {name!r}{nearest(name, BASELINES)}")
            if name.startswith("sae_"):
                raise ValueError(
                    f"{name} codes the dictionary of one run; leave it out, and use `sae eval --baselines`"
                )
        return list(dict.fromkeys(names))

    def to_yaml(self) -> str:
        """Every default written out; a recipe again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Entry:
    """An SAE that takes part."""

    name: str
    sae: SAEConfig


@dataclass(frozen=True)
class Definite:
    """A recipe on its world, with nothing left open."""

    recipe: Recipe
    """With numbers for `d_sae` and `l0`; in its entries the word l0 stays as it is."""
    source: Source
    entries: tuple[Entry, ...]
    l0_truth: float | None
    """Mean number of true features that fire for one activation, if known."""

    @property
    def d_sae(self) -> int:
        """Of every SAE."""
        assert self.recipe.d_sae is not None
        return self.recipe.d_sae

    @property
    def k(self) -> int:
        """k of baselines that select a fixed number of latents: the L0, rounded."""
        assert self.recipe.l0 is not None
        return max(1, min(round(self.recipe.l0), self.source.d_in, self.d_sae))


def read_recipe(
    path: Path | None = None, world: Path | None = None, overrides: Sequence[str] = (), added: Sequence[str] = ()
) -> Recipe:
    """The recipe in a file, default `configs/leaderboard.yaml`, on another world if one is given.

    `overrides` are command-line words such as `--seeds 5` or `--train.n_samples 1_000_000`, `added` entries in YAML.

    Raises:
        UsageError: a file cannot be read, or a key or a value breaks a rule.
    """
    file = config_path("leaderboard.yaml") if path is None else path
    mapping = read_yaml(file)
    own = mapping.pop("world", None)
    if world is None and own is not None:
        world = _from_here(file.parent / str(own))
    if world is not None:
        mapping["source"] = world_source(world)
    mapping = override(mapping, flags(overrides))
    entries = mapping.get("entries") or []
    if isinstance(entries, list):
        mapping["entries"] = [*entries, *map(_entry, added)]
    try:
        return Recipe.model_validate(mapping)
    except ValidationError as error:
        raise UsageError(f"{file}: {explain(error, Recipe)}") from error


def world_source(path: Path) -> dict[str, Any]:
    """The section `source` for a file or folder that describes a world, or that of a training configuration.

    Raises:
        UsageError: it is neither.
    """
    if path.is_dir():
        return {"kind": "world", "path": str(path)}
    mapping = read_yaml(path)
    if isinstance(mapping.get("source"), Mapping):
        return dict(mapping["source"])
    if mapping.keys() >= KEYS_OF_A_WORLD:
        return {"kind": "world", "path": str(path)}
    raise UsageError(
        f"{path} is not a world: it has neither n_features and d_hidden, as configs/worlds/synth256.yaml, nor a "
        "section source, as configs/toy.yaml; give a file that has"
    )


def definite(recipe: Recipe) -> Definite:
    """Opens the world, and counts what the recipe leaves open.

    Raises:
        UsageError: nothing is known of its true features, or an entry breaks a rule.
    """
    source: Source = recipe.source.open()
    if source.d_out is not None:
        raise UsageError(
            "the source has a target, but the leaderboard is for SAEs that reconstruct their input; leave it out"
        )
    if source.truth is None:
        raise UsageError(
            f"the source of kind {recipe.source.kind!r} knows no true features to rank by; give a world "
            "(docs/worlds.md), a toy model, or an array with source.truth"
        )
    acts = source.held_out("calibration", N_L0).acts
    l0_truth = None if acts is None else float(f"{int((acts.values > 0).sum()) / len(acts):.3g}")
    l0 = recipe.l0 or l0_truth
    if l0 is None:
        raise UsageError("the source knows its features but not when they fire, so L0 is unknown; set it with --l0")
    d_sae = recipe.d_sae or len(source.truth)
    entries: dict[str, Entry] = {}
    plain = []
    for given in recipe.entries:
        options = _filled(given, l0)
        entry = _checked(options, d_sae)
        if entry.sae.transcodes:
            raise UsageError(f"entry {entry.name}: a transcoder has no target here; leave it out")
        if entry.name in entries:
            if entries[entry.name] == entry:  # the same command again, with --resume
                logger.info("%s already takes part", entry.name)
                continue
            raise UsageError(
                f"two entries are called {entry.name!r}; give one a name, as in {{name: {entry.name}_2, "
                f"kind: {entry.sae.kind}, ...}}"
            )
        entries[entry.name] = entry
        plain.append(given)
    known = applicable(source)
    kept = [name for name in recipe.baselines if name in known]
    if len(kept) < len(recipe.baselines):
        left_out = ", ".join(name for name in recipe.baselines if name not in known)
        logger.info("the source does not say when its features fire, which these need: %s; they are omitted", left_out)
    if not entries and not kept:
        raise UsageError("there are no entries; give entries or baselines, as configs/leaderboard.yaml does")
    logger.info("every SAE has %d latents, of which %g should fire", d_sae, l0)
    update = {"d_sae": d_sae, "l0": l0, "entries": plain, "baselines": kept}
    return Definite(recipe.model_copy(update=update), source, tuple(entries.values()), l0_truth)


def _entry(words: str) -> dict[str, Any]:
    """An entry from the command line."""
    try:
        entry = parse_yaml(words)
    except yaml.YAMLError as error:
        raise UsageError(f"--add {words}: not valid YAML; give an entry as '{{kind: topk, k: 3}}'") from error
    if not isinstance(entry, dict):
        raise UsageError(f"--add {words}: an entry is a mapping, as in '{{kind: topk, k: 3}}'")
    return entry


def _filled(entry: Mapping[str, Any], l0: float) -> dict[str, Any]:
    """The entry with the L0 in place of the word."""
    fields = getattr(SAEConfig.kinds.get(entry["kind"]), "model_fields", {})

    def filled() -> Iterator[tuple[str, Any]]:
        for key, value in entry.items():
            if value != L0 or key not in fields:
                yield key, value
            else:
                annotation = fields[key].annotation
                types = (annotation, *get_args(annotation))
                yield key, max(1, round(l0)) if int in types and float not in types else l0

    return dict(filled())


def _checked(options: Mapping[str, Any], d_sae: int) -> Entry:
    """The entry as a configuration."""
    name = options.get("name", options["kind"])
    own = {key: value for key, value in options.items() if key != "name"}
    try:
        return Entry(name, SAEConfig.of_kind({**own, "d_sae": d_sae}))
    except ValidationError as error:
        raise UsageError(f"entry {name}: {explain(error, SAEConfig.kinds[options['kind']])}") from error
    except ValueError as error:
        raise UsageError(f"entry {name}: {error}") from error


def _from_here(path: Path) -> Path:
    """The path relative to the working directory, if it lies in it."""
    try:
        return Path(os.path.abspath(path)).relative_to(Path.cwd())
    except ValueError:
        return path
