"""`sae demo digits`: what do latents mean when no ground truth is known?

A small network learns to read scanned digits (scikit-learn ships 1797 of them), its hidden activations are written
to a file, and an SAE is trained on the file as on any other. Then each digit class asks: which single latent tells
me best? and which single neuron, and which principal direction?
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.config import load_config
from sae.config_text import config_path
from sae.console import print_table, progress
from sae.directory import check_out
from sae.errors import UsageError
from sae.extras import require
from sae.locks import DEMO_LOCK, held
from sae.metrics.code_recovery import auroc
from sae.names import CLASSES
from sae.run import train
from toymodels.optim import AdamW
from toymodels.streams import generator

D_HIDDEN = 32
N_CLASSES = 10
N_TRAIN = 1300
N_SHIFTED = 40  # shifted copies of each training image, so that the file holds more than a thousand rows
ACTIVATIONS = "activations.npy"


class DigitsNet(nn.Module):
    """8 x 8 pixels -> 128 -> 32 ReLU neurons -> 10 classes. The SAE reads the 32, which share the ten classes."""

    def __init__(self, stream: torch.Generator) -> None:
        super().__init__()
        self.strokes = nn.Linear(64, 128)
        self.shapes = nn.Linear(128, D_HIDDEN)
        self.classify = nn.Linear(D_HIDDEN, N_CLASSES)
        for layer in (self.strokes, self.shapes, self.classify):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=stream)
            nn.init.zeros_(layer.bias)

    def hidden(self, images: Float[Tensor, "batch 64"]) -> Float[Tensor, "batch d_hidden"]:
        return self.shapes(self.strokes(images).relu()).relu()

    def forward(self, images: Float[Tensor, "batch 64"]) -> Float[Tensor, "batch 10"]:
        return self.classify(self.hidden(images))


def run(out: Path, seed: int, overwrite: bool) -> None:
    """Runs the whole demo into `out`."""
    for package in ("plotly", "sklearn"):
        require(package, "demo", "a demo")
    check_out(out, resume=None, overwrite=overwrite)
    if (out / ACTIVATIONS).exists() and not overwrite:
        raise UsageError(f"{out / ACTIVATIONS} exists; give another --out, or --overwrite")
    with held(out, DEMO_LOCK):
        _run(out, seed)


def _run(out: Path, seed: int) -> None:
    images, labels, test_images, test_labels = load_digits(seed)
    net = train_network(images, labels, seed)
    with torch.no_grad():
        accuracy = float((net(test_images).argmax(dim=1) == test_labels).float().mean())
        rows, test_rows = net.hidden(images), net.hidden(test_images)
    np.save(out / ACTIVATIONS, rows.numpy())
    print(f"a network with {D_HIDDEN} hidden neurons reads {accuracy:.1%} of {len(test_labels)} unseen digits")
    print(f"wrote {out / ACTIVATIONS}: {len(rows)} rows of hidden activations")

    words = (
        "--source.path",
        json.dumps(str(out / ACTIVATIONS)),
        "--out",
        json.dumps(str(out)),
        "--train.seed",
        str(seed),
    )
    config = load_config(config_path("digits.yaml"), words)
    with progress(f"training {config.sae.kind}", config.n_steps) as on_line:
        result = train(config, overwrite=True, report=False, on_line=on_line)

    mean = rows.mean(dim=0)
    components = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors
    units: dict[str, Callable[[Tensor], Tensor]] = {
        "latent": lambda x: result.sae.encode(x).dense(),
        "neuron": lambda x: x,
        "PCA direction": lambda x: (x - mean) @ components,
    }
    scans, scan_labels = rows[:N_TRAIN], labels[:N_TRAIN]
    table = {name: best_units(read(scans), scan_labels, read(test_rows), test_labels) for name, read in units.items()}
    (out / CLASSES).write_text(json.dumps({"accuracy": accuracy, "units": table}, indent=2) + "\n", encoding="utf-8")
    show(table, result.metrics)
    from sae.report import write_report  # noqa: PLC0415 - an extra, and slow to import

    print(f"\nwrote {write_report([out])}")


def load_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (with shifted copies) and labels, then test images and labels: 1300 and 497 scans."""
    from sklearn.datasets import load_digits as load  # noqa: PLC0415

    data = load()
    images = torch.from_numpy(data.images).float() / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=generator(seed, "digits", "split"))
    train_rows, test_rows = order[:N_TRAIN], order[N_TRAIN:]
    shifted = shift(images[train_rows].repeat(N_SHIFTED, 1, 1), generator(seed, "digits", "shift"))
    return (
        torch.cat([images[train_rows], shifted]).flatten(1),
        labels[train_rows].repeat(N_SHIFTED + 1),
        images[test_rows].flatten(1),
        labels[test_rows],
    )


def shift(images: Float[Tensor, "batch 8 8"], stream: torch.Generator) -> Float[Tensor, "batch 8 8"]:
    """Each image moved by a random fraction of a pixel in each direction (at most 0.8), and a little noise."""
    moves = (torch.rand(len(images), 2, generator=stream) - 0.5) * 0.4
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, 2] = moves
    grid = F.affine_grid(theta, [len(images), 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    return (moved + 0.02 * torch.randn(moved.shape, generator=stream)).clamp(0, 1)


def train_network(images: Float[Tensor, "n 64"], labels: Int[Tensor, " n"], seed: int) -> DigitsNet:
    """Cross-entropy, AdamW, 1500 steps of 256 images."""
    net = DigitsNet(generator(seed, "digits", "network"))
    optimizer = AdamW(net.parameters())
    stream = generator(seed, "digits", "batches")
    for _ in range(1500):
        batch = torch.randint(len(images), (256,), generator=stream)
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.step(torch.autograd.grad(loss, optimizer.parameters), lr=3e-3)
    return net.requires_grad_(False)


def best_units(
    values: Float[Tensor, "n units"],
    labels: Int[Tensor, " n"],
    test_values: Float[Tensor, "n_test units"],
    test_labels: Int[Tensor, " n_test"],
) -> list[dict[str, float]]:
    """For each class its best single unit, of either sign, chosen on the training rows and judged on the test rows.

    AUROC = P(value on the class > value elsewhere), ties counting half: .5 is chance, 1 tells the class apart.
    """
    result = []
    for digit in range(N_CLASSES):
        chosen = class_auroc(values, labels == digit)
        unit = int((chosen - 0.5).abs().argmax())
        sign = 1.0 if chosen[unit] >= 0.5 else -1.0
        judged = class_auroc(sign * test_values[:, unit, None], test_labels == digit)
        result.append({"class": digit, "unit": unit, "sign": sign, "auroc": float(judged)})
    return result


def class_auroc(values: Float[Tensor, "n units"], on: Bool[Tensor, " n"]) -> Float[Tensor, " units"]:
    """AUROC of each unit for the rows that are on."""
    unit = torch.arange(values.shape[1]).repeat_interleave(int(on.sum()))
    return auroc(values.T.contiguous().sort(dim=1).values, unit, values[on].T.flatten())


def show(table: dict[str, list[dict[str, float]]], metrics: dict[str, float]) -> None:
    """Prints each class's best units side by side."""
    rows = [
        [str(digit), *(f"{table[name][digit]['auroc']:.3f}  #{table[name][digit]['unit']}" for name in table)]
        for digit in range(N_CLASSES)
    ]
    rows.append(["mean", *(f"{np.mean([row['auroc'] for row in table[name]]):.3f}     " for name in table)])
    print_table(
        "AUROC of the best single unit for each digit, on unseen scans",
        ["digit", *table],
        rows,
        f"SAE: L0 {metrics['metrics/l0']:.1f}, FVU {metrics['metrics/fvu']:.3f}, "
        f"{metrics['sparsity/dead_features']:.0f} dead latents",
    )
