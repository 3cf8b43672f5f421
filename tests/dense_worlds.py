"""The judge of synthetic worlds: every feature of every row drawn, then gated, generation by generation."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from toymodels.synthetic import SyntheticWorld


def dense_features(world: SyntheticWorld, n: int, stream: torch.Generator) -> Tensor:
    """x [n, n_features] of a world with shared factors or independent features, in the most obvious way."""
    forest, strengths = world.forest, world.strengths
    factors = torch.zeros(world.n_features, 1) if world.correlation is None else world.correlation
    z = torch.randn(n, factors.shape[1], generator=stream) @ factors.T
    z += (1 - factors.square().sum(1)).sqrt() * torch.randn(n, world.n_features, generator=stream)
    draws = z.double() > -torch.special.ndtri(world.probs)
    mean, std = torch.from_numpy(strengths.mean), torch.from_numpy(strengths.std)
    x = draws * (mean + std * torch.randn(n, world.n_features, generator=stream)).relu()
    parent = torch.from_numpy(forest.parent)
    for generation in map(torch.from_numpy, forest.generations()):
        for i in generation[parent[generation] >= 0]:
            above = x[:, parent[i]]
            x[:, i] *= above / mean[parent[i]] if forest.scaled[i] else above > 0
        for members in map(torch.from_numpy, forest.families()):
            if members[0] in generation:
                score = torch.rand(n, len(members), generator=stream) * (x[:, members] > 0)
                winner = torch.nn.functional.one_hot(score.argmax(1), len(members))
                x[:, members] *= winner
    return x


class Moments(NamedTuple):
    """Means over rows, and means of their squares: enough for standard errors."""

    n: int
    names: dict[str, tuple[Tensor, Tensor]]


def moments(batches: Iterable[Tensor]) -> Moments:
    """Of firing, of firing together, of x, and of x_i x_j."""
    n, sums = 0, {}
    for batch in batches:
        x = batch.double()
        fires = (x > 0).double()
        together = fires.T @ fires
        new = {
            "fires": (fires.sum(0), fires.sum(0)),
            "together": (together, together),
            "x": (x.sum(0), x.square().sum(0)),
            "x_i x_j": (x.T @ x, x.square().T @ x.square()),
        }
        sums = {key: (a + sums.get(key, (0, 0))[0], b + sums.get(key, (0, 0))[1]) for key, (a, b) in new.items()}
        n += len(x)
    return Moments(n, {key: (a / n, b / n) for key, (a, b) in sums.items()})


def worst_z(ours: Moments, theirs: Moments) -> dict[str, float]:
    """The largest difference of each kind, in its standard errors; rare events (under 10 seen in both) are left out."""
    worst = {}
    for key, (a, a2) in ours.names.items():
        b, b2 = theirs.names[key]
        variance = (a2 - a * a).clamp(min=0) / ours.n + (b2 - b * b).clamp(min=0) / theirs.n
        seen = "together" if a.ndim == 2 else "fires"
        often = ours.names[seen][0] * ours.n + theirs.names[seen][0] * theirs.n >= 20
        worst[key] = float(((a - b).abs() / variance.clamp(min=1e-300).sqrt())[often].max())
    return worst


def node(feature: int | None, *children: dict, exclusive: bool = False, scales: bool = False) -> dict:
    """As SAELens's hierarchy.json has it."""
    return {
        "feature_index": feature,
        "mutually_exclusive_children": exclusive,
        "scale_children_by_parent": scales,
        "feature_id": None,
        "children": list(children),
    }


def write_saelens_world(folder: Path, n: int = 40, d: int = 16, rank: int = 3) -> dict[str, Tensor]:
    """A small world in SAELens's files: trees with and without exclusion and scaling, and nodes without features."""
    stream = torch.Generator().manual_seed(5)
    factor = 0.3 * torch.randn(n, rank, generator=stream)
    weights = {
        "feature_vectors": torch.nn.functional.normalize(torch.randn(n, d, generator=stream), dim=1),
        "bias": torch.randn(d, generator=stream),
        "firing_probabilities": torch.linspace(0.4, 0.05, n),
        "correlation_factor": factor,
        "correlation_diag": 1 - factor.square().sum(1),
    }
    roots = [
        node(0, node(3, node(9), node(10), exclusive=True), node(4), node(5), exclusive=True, scales=True),
        node(1, node(6, node(11), scales=True), node(7)),
        node(None, node(2), node(20), node(None, node(12), node(13)), exclusive=True),
    ]
    config = {
        "num_features": n,
        "hidden_dim": d,
        "firing_probability": {"max_prob": 0.4, "min_prob": 0.05, "generator_name": "linear"},
        "hierarchy": None,
        "orthogonalization": None,
        "correlation": {"rank": rank, "correlation_scale": 0.3, "seed": None},
        "std_firing_magnitudes": {
            "mean": 0.5,
            "std": 0.5,
            "min_value": None,
            "max_value": None,
            "generator_name": "folded_normal",
        },
        "mean_firing_magnitudes": {"start": 2.0, "end": 1.0, "generator_name": "linear"},
        "bias": 1.0,
        "dtype": "float32",
        "seed": 7,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "synthetic_model.safetensors")
    (folder / "hierarchy.json").write_text(json.dumps({"roots": roots}), encoding="utf-8")
    (folder / "synthetic_model_config.json").write_text(json.dumps(config), encoding="utf-8")
    return weights
