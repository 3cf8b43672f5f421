"""Why a feature is missed: conditions that hold of features, found or missed, and the first that holds is the reason.

A feature is missed when the cosine to its own latent is at most .9. What latents are made of comes from `parts_of`; the
*carrier* of a feature is the latent that holds most of it. A share counts when it is more than random directions show,
or beside such a share of a feature that belongs with it: kin in a tree or group, or a correlated one. In order:

    silent      it is on in no evaluation sample
    absorbed    its carrier also holds one of its descendants; or some latent holds two of its children and not itself,
                and it has no carrier: children's latents speak for it
    ancestor    its carrier also holds its parent, or an ancestor further up: one latent for both
    siblings    its carrier also holds a sibling: another child of its parent, or member of its exclusive group
    correlated  its carrier also holds a feature whose being on is correlated with its own (hedging)
    split       it is the largest part of at least two latents: its firing is shared out between them
    alike       another feature has a cosine above .7 to it: one latent passes for both
    rare        on less than half as often as the median found feature
    weak        half as strong as the median found feature, or less
    mixed       its carrier also holds features that have nothing to do with it
    inexact     its carrier holds nothing else, but lies further off than that
    nobody      no latent holds it, and none of the above explains that

Medians are over all features that are ever on where fewer than a tenth of these are found: a dictionary that has only
begun to learn finds the most frequent ones alone, and beside those everything is rare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.diagnosis.holdings import Holdings
from sae.diagnosis.structure import CoFiring, Structure

REASONS = {
    "silent": "never on in the evaluation rows",
    "absorbed": "absorbed into its children",
    "ancestor": "merged with its parent",
    "siblings": "merged with its siblings",
    "correlated": "merged with a correlated feature",
    "split": "split over several latents",
    "alike": "another feature points the same way",
    "rare": "rare",
    "weak": "weak",
    "mixed": "in a latent of unrelated features",
    "inexact": "in one latent, inexactly",
    "nobody": "in no latent",
}
SHARE_OF_MEDIAN = 0.5
ENOUGH_FOUND = 0.1
ALIKE = 0.7
RAREST = "rarest quarter"


class Verdict(NamedTuple):
    """`holds[name]` says of which features a condition holds; `reason` is the place of the first in REASONS, -1 for
    features that are not missed."""

    holds: dict[str, Bool[Tensor, " n_features"]]
    reason: Int[Tensor, " n_features"]
    carrier: Int[Tensor, " n_features"]
    """The latent that holds most of a feature, -1 without one."""
    n_carriers: Int[Tensor, " n_features"]


class _Pairs(NamedTuple):
    """All ordered pairs of parts of one latent, and what they are to each other."""

    one: Int[Tensor, " pairs"]
    down: Bool[Tensor, " pairs"]
    """The other part is a descendant of this one."""
    up: Bool[Tensor, " pairs"]
    sibling: Bool[Tensor, " pairs"]
    linked: Bool[Tensor, " pairs"]
    """No kin, but correlated."""
    i: Int[Tensor, " pairs"]
    k: Int[Tensor, " pairs"]
    other: Int[Tensor, " pairs"]

    @classmethod
    def of(cls, held: Holdings, structure: Structure, seen: CoFiring) -> _Pairs:
        one, other = held.pairs()
        i, k = held.feature[one], held.feature[other]
        down, up = structure.descends(k, i), structure.descends(i, k)
        sibling = structure.siblings(i, k) & ~down & ~up
        linked = ~(down | up | sibling) & seen.correlated(seen.phi(i, k, seen.together(i, k)))
        return cls(one, down, up, sibling, linked, i, k, other)

    @property
    def related(self) -> Bool[Tensor, " pairs"]:
        return self.down | self.up | self.sibling | self.linked


def telling(held: Holdings, structure: Structure, seen: CoFiring) -> Holdings:
    """The parts that count: those above `least`, and those beside such a part of a feature that belongs with theirs."""
    pairs = _Pairs.of(held, structure, seen)
    strong = held.share > held.least
    counts = strong.clone()
    counts[pairs.one[pairs.related & strong[pairs.other]]] = True
    return held.kept(counts)


def verdict(
    table: Mapping[str, Tensor],
    held: Holdings,
    structure: Structure,
    seen: CoFiring,
    missed: Bool[Tensor, " n_features"],
) -> Verdict:
    """`table` has the frequency, magnitude and nearest_feature_cosine of each feature; `held` the `telling` parts."""
    n = len(missed)
    frequency, magnitude = table["frequency"].double(), table["magnitude"].double()
    ever = frequency > 0
    found = ever & ~missed
    reference = found if int(found.sum()) > ENOUGH_FOUND * int(ever.sum()) else ever
    holds = {name: torch.zeros(n, dtype=torch.bool) for name in REASONS}
    holds["silent"] = ~ever
    if bool(reference.any()):
        holds["rare"] = ever & (frequency < SHARE_OF_MEDIAN * frequency[reference].median())
        holds["weak"] = ever & (magnitude <= SHARE_OF_MEDIAN * magnitude[reference].median())
    holds["alike"] = table["nearest_feature_cosine"] > ALIKE

    main = held.main(n)
    carried = main >= 0
    pairs = _Pairs.of(held, structure, seen)
    from_main = main[pairs.i] == pairs.one
    for name, related in (
        ("absorbed", pairs.down),
        ("ancestor", pairs.up),
        ("siblings", pairs.sibling),
        ("correlated", pairs.linked),
        ("mixed", ~pairs.related),
    ):
        holds[name][pairs.i[related & from_main]] = True
    above = structure.parent[pairs.i]
    heads = above[(above >= 0) & (above == structure.parent[pairs.k])]
    holds["absorbed"][heads[~carried[heads]]] = True

    leads = held.feature[held.largest()].bincount(minlength=n)
    holds["split"] = leads >= 2
    alone = carried.clone()
    for name in ("absorbed", "ancestor", "siblings", "correlated", "mixed"):
        alone &= ~holds[name]
    holds["inexact"] = alone & missed
    holds["nobody"] = ~carried

    reason = torch.full((n,), -1)
    for place, name in reversed(list(enumerate(REASONS))):
        reason[missed & holds[name]] = place
    assert bool((reason[missed] >= 0).all()), "a feature is carried, and then alone or not, or it is not"
    carrier = torch.where(carried, held.latent[main.clamp(min=0)] if len(held.latent) else main, -1)
    return Verdict(holds, reason, carrier, held.feature.bincount(minlength=n))


class Rate(NamedTuple):
    """How often features are missed where something holds of them, and where it does not."""

    n: int
    missed_with: float
    missed_without: float
    difference: float
    low: float
    high: float
    """95 % interval of the difference (Newcombe 1998, from Wilson's intervals)."""
    same_frequency: float
    """The difference among features of like frequency: Mantel-Haenszel over deciles; nan where there is none."""


def rate(
    holds: Bool[Tensor, " features"],
    missed: Bool[Tensor, " features"],
    frequency: Float[Tensor, " features"] | None,
) -> Rate:
    """Does a condition predict being missed?

    difference      = p - q, p = P(missed | holds), q = P(missed | does not)
    same_frequency  = Σ_s w_s (p_s - q_s) / Σ_s w_s over deciles s of frequency, w_s = n_s m_s / (n_s + m_s), n_s and
                      m_s the features in s with and without; nan without frequencies
    """
    n, m = int(holds.sum()), int((~holds).sum())
    x, y = int((missed & holds).sum()), int((missed & ~holds).sum())
    p, q = x / n if n else 0.0, y / m if m else 0.0
    (p_low, p_high), (q_low, q_high) = _wilson(x, n), _wilson(y, m)
    low = p - q - ((p - p_low) ** 2 + (q_high - q) ** 2) ** 0.5
    high = p - q + ((p_high - p) ** 2 + (q - q_low) ** 2) ** 0.5
    weighted = total = 0.0
    parts = () if frequency is None else frequency.argsort(stable=True).tensor_split(10)
    for part in parts:
        inside, lost = holds[part], missed[part].double()
        a, b = int(inside.sum()), int((~inside).sum())
        if a and b:
            weight = a * b / (a + b)
            weighted += weight * float(lost[inside].mean() - lost[~inside].mean())
            total += weight
    return Rate(n, p, q, p - q, low, high, weighted / total if total else float("nan"))


def _wilson(x: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not n:
        return 0.0, 1.0
    centre = (x + z * z / 2) / (n + z * z)
    reach = z / (n + z * z) * (x * (n - x) / n + z * z / 4) ** 0.5
    return centre - reach, centre + reach


def attributes(
    table: Mapping[str, Tensor], structure: Structure, phi: Float[Tensor, " n_features"]
) -> dict[str, Bool[Tensor, " n_features"]]:
    """What may predict being missed, known without any dictionary; quarters are of the features that are ever on.

    Of names for one set of features, as where all children are members of exclusive groups, the first alone is kept.
    """

    def quarter(values: Tensor) -> Bool[Tensor, " n_features"]:
        """The highest quarter; none where all are alike."""
        order = values.double().argsort(descending=True, stable=True)
        inside = torch.zeros(len(values), dtype=torch.bool)
        inside[order[: len(values) // 4]] = True
        return inside if bool((values != values[0]).any()) else torch.zeros_like(inside)

    found = {
        RAREST: quarter(-table["frequency"]),
        "weakest quarter": quarter(-table["magnitude"]),
        "parent": structure.n_children > 0,
        "parent of an exclusive group": structure.exclusive_parent,
        "child": structure.parent >= 0,
        "member of an exclusive group": structure.group >= 0,
        "most correlated quarter": quarter(phi.abs()),
        "quarter with the closest neighbour": quarter(table["nearest_feature_cosine"]),
    }
    first = {tuple(holds.tolist()): name for name, holds in reversed(found.items())}
    return {name: holds for name, holds in found.items() if first[tuple(holds.tolist())] == name}
