"""Transcoders: what is reconstructed is not what is read. Another kind decides which latents fire."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sae.config import SAEConfig
from sae.sparsifiers.base import Sparsifier


class _Transcoding(SAEConfig):
    """What both transcoders share: TopK with k, or the selection of any other kind."""

    transcodes: ClassVar[bool] = True
    serves_as_base: ClassVar[bool] = False

    tied_init: bool = False
    """Start the encoder as the decoder's transpose; only where the target is as wide as the input."""
    tied_bias: bool = False
    """Always off: b_dec lies in the space of the target, and a fixed centre is subtracted from the input."""
    # On the Zipf set, against 1/32: FVU .317 -> .305, MCC .312 -> .340.
    aux_coefficient: float = Field(default=1.0, ge=0)
    """Weight of AuxK, the loss that revives dead latents (0 turns it off)."""
    k: int | None = Field(default=None, gt=0)
    """Most latents that fire for one activation, as in TopK; give this or base."""
    base: dict[str, Any] | None = None
    """Another kind that selects, with its own options, as in {kind: batchtopk, k: 3}."""

    @model_validator(mode="before")
    @classmethod
    def _rows_as_in_the_base(cls, given: Any) -> Any:
        """Decoder rows are free or not as in the kind that selects, unless set explicitly."""
        if not isinstance(given, dict) or "unit_norm_decoder" in given:
            return given
        base = given.get("base")
        name = base.get("kind") if isinstance(base, dict) else "topk"
        kind = SAEConfig.kinds.get(name, cls) if isinstance(name, str) else cls
        return given | {"unit_norm_decoder": kind.model_fields["unit_norm_decoder"].default}

    @field_validator("tied_bias")
    @classmethod
    def _bias_is_free(cls, tied: bool) -> bool:
        if tied:
            raise ValueError("tied_bias must be off, got true: b_dec lies in the space of the target; leave it out")
        return tied

    @field_validator("base")
    @classmethod
    def _base_selects(cls, base: dict[str, Any] | None, info: Any) -> dict[str, Any] | None:
        """The options of the kind, with its defaults written out."""
        if base is None or "d_sae" not in info.data:
            return base
        shared = SAEConfig.model_fields.keys() - {"kind"}
        if shared & base.keys():
            names = ", ".join(sorted(shared & base.keys()))
            raise ValueError(f"base accepts only options specific to its kind, got {names}; move these next to base")
        kind = _selection(base, info.data["d_sae"])
        if kind.transcodes or not kind.serves_as_base:
            raise ValueError(f"base must be a kind that selects, got {kind.kind!r}; take topk or batchtopk")
        if getattr(kind, "refine", 0):
            raise ValueError("base cannot refine: a transcoder's residual is not in its input space; leave refine out")
        return {name: value for name, value in kind.model_dump(mode="json").items() if name not in shared}

    @field_validator("resample_every")
    @classmethod
    def _nothing_to_resample(cls, every: int | None) -> int | None:
        if every is not None:
            raise ValueError(
                f"resample_every must be left out of a transcoder, got {every}: inputs are no directions to decode to; "
                "use aux_coefficient for dead latents"
            )
        return every

    @model_validator(mode="after")
    def _one_selection(self) -> _Transcoding:
        if (self.k is None) == (self.base is None):
            given = "neither" if self.k is None else "both"
            raise ValueError(f"needs k (for TopK) or base (another kind with its options), got {given}; give one")
        self._selects()
        if self.prefixes is not None and (self.base or {}).get("multi_k") is not None:
            raise ValueError("prefixes and the base's multi_k both ask for several reconstructions; give one of them")
        return self

    @property
    def sparsity_warmup_fraction(self) -> float:
        """The base's."""
        return self._selects().sparsity_warmup_fraction

    def sparsity_share(self, warmed: float) -> float:
        return self._selects().sparsity_share(warmed)

    def _selects(self) -> SAEConfig:
        return _selection(self.base or {"kind": "topk", "k": self.k}, self.d_sae)

    def build(self) -> Sparsifier:
        built: Sparsifier = self._selects().build()
        return built


class TranscoderConfig(_Transcoding):
    """Transcoder (Dunefsky et al. 2024, section 3): from an MLP's input to its output, or between any two places."""

    kind: Literal["transcoder"] = "transcoder"


class SkipTranscoderConfig(_Transcoding):
    """Transcoder with an affine skip connection (Paulo et al. 2025, section 3): W_skip takes the linear part."""

    skips: ClassVar[bool] = True

    kind: Literal["skip_transcoder"] = "skip_transcoder"


def _selection(base: dict[str, Any], d_sae: int) -> SAEConfig:
    """The configuration of the kind that selects."""
    kind: SAEConfig = SAEConfig.of_kind({"d_sae": d_sae} | base)
    return kind
