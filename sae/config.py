"""A run is a file: the configuration of one training run, read from YAML and validated as a whole.

Two of its sections are open families, distinguished by their `kind`: `source` (where activations come from) and `sae`
(the sparsifier). Defining a member registers it, so a new sparsifier is a class in one file and no list has to be
edited.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_serializer, field_validator, model_validator

from sae.config_base import Family, Section
from sae.config_text import explain, flags, read_yaml
from sae.errors import UsageError
from sae.hub import said

# The last part of a run in which no latent starts anew.
LEFT_ALONE = 0.2
KernelName = Literal["auto", "reference", "torch", "native", "triton"]
PrecisionName = Literal["auto", "fp32", "bf16", "exact"]
MomentsName = Literal["float32", "int8"]


class SourceConfig(Family):
    """Where activations come from. `open()` reads the first of them, so that bad data is reported before training."""

    @abstractmethod
    def open(self) -> Any:
        """The source itself (a `sae.sources.Source`)."""

    def open_beside(self, others: Sequence[Any]) -> Any:
        """The same, when others are open: what is slow to load is loaded once."""
        return self.open()

    @property
    def stream(self) -> dict[str, Any]:
        """What determines the order of the data: sources that agree in it can be read together."""
        return self.model_dump(mode="json")


class SAEConfig(Family):
    """What is trained: the width, how it starts, and (in each kind) the sparsifier's own options."""

    transcodes: ClassVar[bool] = False
    """The kind may reconstruct a target other than its input."""
    skips: ClassVar[bool] = False
    """The input also reaches the reconstruction through a matrix W_skip."""
    serves_as_base: ClassVar[bool] = True
    """A transcoder may take its selection: it selects among pre-latents, and the rest are options of every kind."""
    lr_factor: ClassVar[float] = 1.0
    """The kind's default learning rate, as a multiple of the other kinds'."""

    d_sae: int = Field(gt=0)
    """Number of latents."""
    decoder_bias: Literal["mean", "geometric_median", "zero"] = "mean"
    """Where b_dec starts: what the encoder subtracts from the activations."""
    tied_init: bool = True
    """Start the encoder as the decoder's transpose."""
    unit_norm_decoder: bool = True
    """Keep decoder rows at norm 1: gradients are projected, and rows renormalised after each step."""
    tied_bias: bool = True
    """The encoder subtracts b_dec from its input. Off: it always subtracts the initial value of b_dec."""
    prefixes: tuple[int, ...] | None = None
    """Matryoshka: ascending widths that end in d_sae; the first latents up to each width must reconstruct by
    themselves. Default: only d_sae."""
    prefix_weights: tuple[float, ...] | None = None
    """Share of each prefix in the loss, normalised to sum to 1; default equal shares."""
    detach_prefixes: bool = False
    """Each prefix but the last trains only the latents it adds, and takes the reconstruction of narrower ones as
    given."""
    sort_prefixes: bool = False
    """Prefixes consist of the latents that fire most often; the trained SAE has its latents in this order."""
    aux_coefficient: float = Field(default=0.0, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""
    aux_k: int | None = Field(default=None, gt=0)
    """Number of dead latents that explain each residual; default d_in / 2."""
    resample_every: int | None = Field(default=None, gt=0)
    """Samples between resamplings, which restart dead latents (Bricken et al. 2023); default never."""

    @model_validator(mode="after")
    def _prefixes_fit(self) -> SAEConfig:
        given, weights = self.prefixes, self.prefix_weights
        if given is not None:
            rising = all(a < b for a, b in zip((0, *given), given, strict=False))
            if not given or not rising or given[-1] != self.d_sae:
                remedy = (
                    "make each wider than the one before" if given and given[-1] == self.d_sae else "end with d_sae"
                )
                raise ValueError(f"prefixes must rise to d_sae={self.d_sae}, got {list(given)}; {remedy}")
        if weights is not None and (len(weights) != len(self.widths) or not all(0 < w < math.inf for w in weights)):
            remedy = f"give {len(self.widths)} of them" if len(self.widths) > 1 else "set prefixes first"
            if len(weights) == len(self.widths):
                remedy = "make each larger than 0"
            raise ValueError(
                f"prefix_weights must be positive, one for each of the prefixes {list(self.widths)}, "
                f"got {list(weights)}; {remedy}"
            )
        wants = [name for name in ("detach_prefixes", "sort_prefixes") if getattr(self, name)]
        if wants and len(self.widths) == 1:
            raise ValueError(
                f"{' and '.join(wants)} need several prefixes, got {list(self.widths)}; give more, or set "
                f"{'both' if len(wants) > 1 else 'it'} to false"
            )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The prefixes that the loss reads: how many of the first latents take part in each reading."""
        return self.prefixes or (self.d_sae,)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each reading in the loss; they sum to 1."""
        weights = self.prefix_weights or (1.0,) * len(self.widths)
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def sparsity_warmup_fraction(self) -> float:
        """The default of `train.sparsity_warmup_fraction`."""
        return 0.05

    def sparsity_share(self, warmed: float) -> float:
        """The share of a sparsity penalty charged when a fraction `warmed` of its warm-up is over; both from 0 to 1."""
        return warmed

    @abstractmethod
    def build(self) -> Any:
        """The sparsifier itself (a `sae.sparsifiers.Sparsifier`)."""


class TrainSection(Section):
    """How long and how fast to train."""

    n_samples: int = Field(default=6_000_000, gt=0)
    """Activations to train on, epochs included."""
    batch_size: int = Field(default=2048, gt=0)
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of Adam; default 3e-3 · min(1, √(256 / d_sae)), and twenty times that for
    matching_pursuit."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together: longer ones are scaled down to it before Adam; default no clipping."""
    clip_rows: float | None = Field(default=None, gt=0)
    """Pull in outliers during training: a row farther from the geometric median than this multiple of the median
    distance is moved to that distance; default off."""
    accumulate: int = Field(default=1, gt=0)
    """Number of parts each batch is split into, to save memory; they are computed one after the other and their
    gradients summed. A batch's budget (BatchTopK) and JumpReLU's target L0 hold for each part."""
    start_from: Path | None = None
    """A trained SAE whose weights the run starts from: a run's directory, files of another library, or an address on
    the Hub."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    """Fraction of the run, at its end, over which the learning rate falls linearly to 0."""
    sparsity_warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the run, from its start, over which a sparsity penalty rises from 0; default 0.05, or the whole run
    where jumprelu has a target l0."""
    dead_after_samples: int | None = Field(default=None, gt=0)
    """A latent silent for this many activations is dead; default min(10 M, n_samples / 40)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, and of the order of the data unless `data_seed` is given."""
    data_seed: int | None = Field(default=None, ge=0)
    """Seed of the order of the data; default `seed`. If it is given, runs that differ only in `seed` see the same
    batches."""
    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1; auto is cuda where torch can use it, else cpu."""
    precision: PrecisionName = "auto"
    """Precision of the matrix products: fp32, bf16, or exact (bf16 screens, fp32 decides); auto is bf16 on CPUs with
    AMX and on CUDA, else fp32."""
    moments: MomentsName = "float32"
    """Format of Adam's moments for encoder and decoder; int8 takes a quarter of the memory and rounds
    stochastically."""
    kernels: KernelName = "auto"
    """What computes a step: C on a CPU (native), triton on CUDA, torch elsewhere or where these cannot run; reference
    is slow and simple."""

    @field_validator("start_from")
    @classmethod
    def _is_whole_as_an_address(cls, start_from: Path | None) -> Path | None:
        said(start_from or "")  # refuses what begins as one and is none
        return start_from

    @field_serializer("start_from", when_used="json")
    def _as_it_was_written(self, start_from: Path | None) -> str | None:
        return None if start_from is None else said(start_from)


class EvaluationSection(Section):
    """What the final metrics are measured on."""

    n_samples: int = Field(default=20_000, gt=0)
    """Number of held-out activations for the final metrics; fewer when the source holds fewer."""


class LogSection(Section):
    """What is logged, and where."""

    every: int = Field(default=50, gt=0)
    """Steps between logged lines."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "sae"
    """W&B project."""
    name: str | None = None
    """W&B run name; default the output directory's."""
    group: str | None = None
    """W&B group."""


class CheckpointSection(Section):
    """How often the state is saved."""

    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=2, gt=0)
    """Number of latest checkpoints to keep on disk."""


class TrainConfig(Section):
    """One training run. `source` may be omitted when activations are passed to `sae.train` directly."""

    source: SerializeAsAny[SourceConfig] | None = None
    sae: SerializeAsAny[SAEConfig]
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    log: LogSection = LogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    out: Path = Path("runs/sae")
    """The run directory."""

    def __init__(self, /, **sections: Any) -> None:
        try:
            super().__init__(**sections)
        except ValidationError as error:
            raise UsageError(explain(error, TrainConfig)) from error

    @field_validator("source", mode="before")
    @classmethod
    def _source_kind(cls, value: Any) -> Any:
        return SourceConfig.of_kind(value)

    @field_validator("sae", mode="before")
    @classmethod
    def _sae_kind(cls, value: Any) -> Any:
        return SAEConfig.of_kind(value)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        # `train:` with nothing under it is null in YAML; it means "all defaults".
        if isinstance(value, Mapping):
            return {key: section for key, section in value.items() if section is not None}
        return value

    @field_validator("train")
    @classmethod
    def _parts_have_rows(cls, train: TrainSection) -> TrainSection:
        if train.accumulate > train.batch_size:
            raise ValueError(
                f"accumulate must lie in 1..batch_size={train.batch_size}, got {train.accumulate}; lower it"
            )
        return train

    @model_validator(mode="after")
    def _a_target_is_wanted(self) -> TrainConfig:
        target = getattr(self.source, "target", None)
        if target is not None and not self.sae.transcodes:
            raise ValueError(
                f"source.target is given, but kind {self.sae.kind!r} reconstructs its input; set sae.kind to "
                "transcoder or skip_transcoder, or leave the target out"
            )
        return self

    @model_validator(mode="after")
    def _resampling_happens(self) -> TrainConfig:
        every, until = self.sae.resample_every, self.n_resampling_steps * self.train.batch_size
        if every is not None and every >= until:
            raise ValueError(
                f"sae.resample_every must lie below {until} samples, where resampling ends (before the learning rate "
                f"falls, and the last {LEFT_ALONE:.0%} of the run), got {every}; lower it"
            )
        return self

    @property
    def n_resampling_steps(self) -> int:
        """Steps from the start in which latents may be resampled; the rest train what they became."""
        return int((1 - max(LEFT_ALONE, self.train.decay_fraction)) * self.n_steps)

    @property
    def n_steps(self) -> int:
        return -(-self.train.n_samples // self.train.batch_size)

    @property
    def data_seed(self) -> int:
        """Of the order of the data."""
        return self.train.seed if self.train.data_seed is None else self.train.data_seed

    @property
    def lr(self) -> float:
        """Peak learning rate. Wider dictionaries want smaller steps; 3e-3 was measured at 256 latents, and the kind's
        factor along with it."""
        return self.train.lr or self.sae.lr_factor * 3e-3 * min(1.0, (256 / self.sae.d_sae) ** 0.5)

    @property
    def sparsity_warmup_fraction(self) -> float:
        given = self.train.sparsity_warmup_fraction
        return self.sae.sparsity_warmup_fraction if given is None else given

    @property
    def dead_after_samples(self) -> int:
        return self.train.dead_after_samples or max(min(10_000_000, self.train.n_samples // 40), 1)

    def to_yaml(self) -> str:
        """The resolved configuration: every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads CONFIG.yaml; `overrides` are command-line words such as `--sae.k 3` or `--sae.k=3`.

    Raises:
        UsageError: the file cannot be read, or a key or value breaks a rule (all are named).
    """
    mapping = read_yaml(path)
    if "sweep" in mapping:
        raise UsageError(f"{path} has a `sweep` section; use `sae sweep {path}`")
    return parse_config(mapping, overrides, where=str(path))


def parse_config(mapping: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> TrainConfig:
    """A validated configuration from a mapping, with dotted overrides applied first."""
    values = override(mapping, flags(overrides))
    try:
        return TrainConfig(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def override(mapping: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with values set under dotted names: whole sections first, then `kind`, which decides which other
    options there are."""
    result = deepcopy(dict(mapping))
    families: dict[str, dict[str, type[Family]]] = {"sae": SAEConfig.kinds, "source": SourceConfig.kinds}
    for name in sorted(values, key=lambda name: (name.count("."), not name.endswith(".kind"))):
        *sections, key = name.split(".")
        place, value = result, values[name]
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        family = families.get(sections[0], {}) if sections else {}
        if key == "kind" and place.get("kind") != value and isinstance(value, str) and value in family:
            # Another kind has other options: keep what both understand, so that the file need not change.
            for other in place.keys() - family[value].model_fields.keys():
                del place[other]
        place[key] = value
    return result
