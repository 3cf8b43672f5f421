"""Where the F1 was lost: in the encoder, in the dictionary, and even with the true dictionary.

    f1_truth_coded    sparse codes of the true features
    f1_learned_coded  sparse codes of the learned dictionary, each feature read from its matched latent
    f1                the SAE's own codes

    1 - f1 = unreachable + dictionary_gap + amortisation_gap
    unreachable      = 1 - f1_truth_coded
    dictionary_gap   = f1_truth_coded - f1_learned_coded    of which size_gap: there are fewer latents than features
    amortisation_gap = f1_learned_coded - f1                of which threshold_gap: another firing threshold is enough

Sparse codes minimise ½|x - zD|² + penalty Σz over z >= 0; penalty and firing threshold are those of highest macro F1 on
validation rows. Once free, and once limited: the codes that a row keeps, its largest ones, are as many as the SAE uses
in that row. After O'Neill & Klindt 2024 and arXiv 2603.28744.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.codes import SparseCodes
from sae.evaluation import Coder, chunk_rows
from sae.held_out import HeldOut
from sae.metrics import Matching, scale_threshold
from sae.metrics.inputs import directions
from toymodels.sparse_coding import best_threshold, refit_largest, sparse_code

# Tried penalties, as shares of the median row's largest projection, from the largest down.
PENALTIES = tuple(torch.logspace(-0.3, -2, 8).tolist())
# A search ends when F1 has fallen so often in a row, or when codes are so many times as dense as the truth and the SAE:
# small penalties cost long supports, most of all where a dictionary is off its truth.
N_FALLS, TOO_DENSE = 2, 4.0
# Rows times features, or latents, that are coded: sparse coding is not free.
ENTRIES, MIN_ROWS, MAX_ROWS = 2**24, 256, 4096
ROWS_AT_ONCE = 512
# Standard errors are those of a jackknife that leaves out one of so many blocks of rows.
N_BLOCKS = 10


def n_rows(n_features: int, d_sae: int) -> int:
    """Evaluation rows that are coded; a quarter as many validation rows choose penalty and threshold."""
    return max(MIN_ROWS, min(MAX_ROWS, ENTRIES // max(n_features, d_sae)))


class Reading(NamedTuple):
    """How well some codes say what the features do."""

    f1: Float[Tensor, " n_features"]
    macro: float
    """Mean f1 of the features that are on in these rows."""
    without: Float[Tensor, " blocks"]
    """The same without each block of rows."""
    r2: float
    fvu: float
    l0: float

    def less(self, other: Reading) -> tuple[float, float]:
        """The macro F1 that the other has less, and its standard error: both read the same rows."""
        return self.macro - other.macro, jackknife(self.without - other.without)


def jackknife(without: Float[Tensor, " blocks"]) -> float:
    """√((B - 1) / B Σ_b (θ_b - mean θ)²), θ_b the statistic without block b."""
    n = len(without)
    return float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


class Choice(NamedTuple):
    """Of a dictionary, on validation rows."""

    f1: float
    penalty: float
    threshold: float


class Rows(NamedTuple):
    """Rows that are coded: what is to be reconstructed, what the features do, what the SAE makes of them."""

    wanted: Float[Tensor, "rows d"]
    a: Float[Tensor, "rows n_features"]
    own: Float[Tensor, "rows d_sae"]
    """The SAE's codes, z_j |w_j|."""
    offset: Float[Tensor, "rows d"]
    """What it reconstructs without codes."""


def open_rows(coder: Coder, held_out: HeldOut, norms: Float[Tensor, " d_sae"]) -> Rows:
    """The SAE's codes of held-out rows; what does not exceed the firing threshold is 0."""
    assert held_out.acts is not None
    codes, offsets = [], []
    for chunk in held_out.x.split(chunk_rows(len(norms))):
        z = coder.encode(chunk)
        codes.append(z.dense() * norms.to(z.values.dtype))
        nothing = SparseCodes(z.values[:, :1] * 0, z.values.new_zeros(len(chunk), 1, dtype=torch.int64), z.d_sae)
        offsets.append(coder.decode(nothing, chunk))
    own = torch.cat(codes)
    own *= own > scale_threshold(held_out.wanted)
    return Rows(held_out.wanted, held_out.acts.dense(), own, torch.cat(offsets))


def f1_gaps(
    coder: Coder,
    truth: Float[Tensor, "n_features d"],
    matching: Matching,
    validation: HeldOut,
    held_out: HeldOut,
    strength: Float[Tensor, " n_features"],
) -> tuple[dict[str, float], dict[str, Float[Tensor, " n_features"]]]:
    """The numbers above with `_se` beside differences, limited ones under `<name>_k`; and f1 of each feature.

    `strength` says which features the true dictionary keeps where it may be no larger than the learned one: the
    strongest. r2 and fvu of the same codes stand under `r2`, `r2_learned_coded`, ... as f1 does.

    Raises:
        ValueError: no feature is on in the validation rows.
    """
    learned, norms = (part.float().cpu() for part in directions(coder.W_dec.detach()))
    features = directions(truth)[0].float().cpu()
    alive = matching.alive.cpu().nonzero().squeeze(1)
    place = torch.full((len(learned),), -1)
    place[alive] = torch.arange(len(alive))
    latent = matching.latent.cpu()
    own_place = torch.where(latent >= 0, place[latent.clamp(min=0)], -1)

    fitting, rows = (open_rows(coder, part, norms) for part in (validation, held_out))
    bias = (fitting.wanted - validation.acts.embed(truth)).mean(dim=0) if validation.acts is not None else 0.0
    identity = torch.arange(len(features))
    dictionaries = {
        "truth": (features, identity, bias),
        "learned": (learned[alive], own_place, None),
    }
    if len(alive) < len(features):
        kept = strength.argsort(descending=True, stable=True)[: len(alive)].sort().values
        small = torch.full((len(features),), -1)
        small[kept] = torch.arange(len(kept))
        dictionaries["small_truth"] = (features[kept], small, bias)

    own = {"": _read(rows.own, latent, rows, rows.own @ learned + rows.offset)}
    threshold = best_threshold(read_out(fitting.own, latent), fitting.a > 0)[0]
    cut = rows.own * (rows.own > threshold)
    own["_best"] = _read(cut, latent, rows, cut @ learned + rows.offset)

    values: dict[str, float] = {"n_rows": float(len(rows.wanted)), "l0": own[""].l0}
    values |= {"f1": own[""].macro, "f1_best": own["_best"].macro, "r2": own[""].r2, "fvu": own[""].fvu}
    table = {"f1_rows": own[""].f1}
    readings: dict[str, dict[str, Reading]] = {"": {}, "_k": {}}
    for name, (atoms, where, centre) in dictionaries.items():
        coded = _coded(atoms, where, centre, fitting, rows)
        for limit, reading in zip(readings, coded, strict=True):
            readings[limit][name] = reading
            values[f"f1_{name}_coded{limit}"], values[f"l0_{name}_coded{limit}"] = reading.macro, reading.l0
            values[f"r2_{name}_coded{limit}"], values[f"fvu_{name}_coded{limit}"] = reading.r2, reading.fvu
            table[f"f1_{name}_coded{limit}"] = reading.f1
    for limit, by_name in readings.items():
        true, best = by_name["truth"], by_name["learned"]
        found = {
            "unreachable": (1 - true.macro, jackknife(true.without)),
            "dictionary_gap": true.less(best),
            "amortisation_gap": best.less(own[""]),
        }
        if "small_truth" in by_name:
            found["size_gap"] = true.less(by_name["small_truth"])
        for name, (value, error) in found.items():
            values[f"{name}{limit}"], values[f"{name}{limit}_se"] = value, error
    values["threshold_gap"], values["threshold_gap_se"] = own["_best"].less(own[""])
    return values, table


def read_out(z: Float[Tensor, "rows d_sae"], latent: Int[Tensor, " n_features"]) -> Float[Tensor, "rows n_features"]:
    """Each feature's code: that of its latent, 0 without one."""
    if not z.shape[1]:
        return z.new_zeros(len(z), len(latent))
    return z[:, latent.clamp(min=0)] * (latent >= 0)


def _coded(
    atoms: Float[Tensor, "n_atoms d"],
    place: Int[Tensor, " n_features"],
    centre: Tensor | float | None,
    fitting: Rows,
    rows: Rows,
) -> tuple[Reading, Reading]:
    """What the best codes of a dictionary say, free and limited; feature i is read from atom place[i]."""
    offsets = [part.offset if centre is None else torch.zeros_like(part.wanted) + centre for part in (fitting, rows)]
    x_fit, x = fitting.wanted - offsets[0], rows.wanted - offsets[1]
    choices = choose(x_fit, fitting.a > 0, atoms, place, (fitting.own > 0).sum(dim=1))
    counts, readings = (rows.own > 0).sum(dim=1), []
    for choice, k in zip(choices, (None, counts), strict=True):
        z = code(x, atoms, choice.penalty)
        z = z if k is None else _limited(x, atoms, z, k)
        z *= z > choice.threshold
        readings.append(_read(z, place, rows, z @ atoms + offsets[1]))
    return readings[0], readings[1]


def choose(
    x: Float[Tensor, "rows d"],
    on: Bool[Tensor, "rows n_features"],
    atoms: Float[Tensor, "n_atoms d"],
    place: Int[Tensor, " n_features"],
    k: Int[Tensor, " rows"],
) -> tuple[Choice, Choice]:
    """Penalty and threshold of highest macro F1, free and limited to k codes a row: from large penalties to small
    ones, until both have fallen N_FALLS times in a row, or codes are TOO_DENSE."""
    largest = (x @ atoms.T).amax(dim=1).median().clamp(min=0) if len(atoms) else x.new_zeros(())
    tried: tuple[list[Choice], list[Choice]] = ([], [])
    dense = TOO_DENSE * max(float(on.sum()), float(k.sum()))
    for penalty in (share * float(largest) for share in PENALTIES):
        z = code(x, atoms, penalty)
        for choices, codes in zip(tried, (z, _limited(x, atoms, z, k)), strict=True):
            threshold, f1 = best_threshold(read_out(codes, place), on)
            choices.append(Choice(f1, penalty, threshold))
        if all(_falls(choices) for choices in tried) or float((z > 0).sum()) > dense:
            break
    free, limited = (max(choices, key=lambda choice: choice.f1) for choices in tried)
    return free, limited


def _falls(choices: list[Choice]) -> bool:
    last = [choice.f1 for choice in choices[-N_FALLS - 1 :]]
    return len(last) > N_FALLS and all(after < before for before, after in pairwise(last))


def code(x: Float[Tensor, "rows d"], atoms: Float[Tensor, "n_atoms d"], penalty: float) -> Float[Tensor, "rows n"]:
    """Sparse codes, some rows at a time."""
    if not len(atoms):
        return x.new_zeros(len(x), 0)
    return torch.cat([sparse_code(part, atoms, penalty) for part in x.split(ROWS_AT_ONCE)])


def _limited(x: Tensor, atoms: Tensor, z: Tensor, k: Int[Tensor, " rows"]) -> Tensor:
    parts = zip(x.split(ROWS_AT_ONCE), z.split(ROWS_AT_ONCE), k.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([refit_largest(rows, atoms, codes, most) for rows, codes, most in parts]) if len(atoms) else z


def _read(z: Float[Tensor, "rows d_sae"], latent: Int[Tensor, " n_features"], rows: Rows, x_hat: Tensor) -> Reading:
    """f1 with its jackknife, r2 with one factor for each feature, fvu and L0."""
    block = torch.arange(len(z)) * N_BLOCKS // len(z)
    read, on = read_out(z, latent), rows.a > 0
    fires = read > 0

    def count(what: Bool[Tensor, "rows n"]) -> Float[Tensor, "blocks n"]:
        return torch.zeros(N_BLOCKS, what.shape[1], dtype=torch.float64).index_add_(0, block, what.double())

    both, either = count(on & fires), count(on) + count(fires)
    n_on = count(on)
    f1 = 2 * both.sum(dim=0) / either.sum(dim=0).clamp(min=1)
    left = n_on.sum(dim=0) - n_on > 0
    partial = 2 * (both.sum(dim=0) - both) / (either.sum(dim=0) - either).clamp(min=1)
    without = (partial * left).sum(dim=1) / left.sum(dim=1).clamp(min=1)
    counted = n_on.sum(dim=0) > 0

    aa, zz, az = (torch.einsum("rn,rn->n", u, v).double() for u, v in ((rows.a, rows.a), (read, read), (rows.a, read)))
    explained = torch.where(zz > 0, az.square() / zz.clamp(min=1e-30), 0.0)
    spread = aa - rows.a.double().sum(dim=0).square() / len(z)
    r2 = torch.where((latent >= 0) & (spread > 1e-12 * aa), 1 - (aa - explained) / spread.clamp(min=1e-30), 0.0)
    wanted = rows.wanted.double()
    fvu = (wanted - x_hat).square().sum() / (wanted - wanted.mean(dim=0)).square().sum().clamp(min=1e-30)
    mean_r2 = float(r2[counted].mean()) if bool(counted.any()) else 0.0
    macro = float(f1[counted].mean()) if bool(counted.any()) else 0.0
    return Reading(f1, macro, without, mean_r2, float(fvu), float((z > 0).sum() / len(z)))
