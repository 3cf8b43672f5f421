"""How much of the activations is reconstructed, and from how few latents."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.errors import UsageError
from sae.metrics.co_statistics import ratio
from sae.metrics.inputs import Matrix, as_codes, as_tensor, column_sums, firing_counts, row_norms

# A latent that fires on more than this share of the samples is dense.
DENSE_ABOVE = 0.1


def mse(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Mean over samples of |x - x_hat|^2, summed over the dimensions."""
    return (x - x_hat).square().sum(dim=1).mean()


def fvu(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: |x - x_hat|^2 / |x - mean(x)|^2.

    Both sums run over the whole batch: a ratio of sums, not a mean of ratios.
    0 is perfect, 1 is predicting the mean; it can exceed 1.

    Raises:
        ValueError: x has no variance (one row, or identical rows).
    """
    total = (x - x.mean(dim=0)).square().sum()
    _check_variance(float(total), len(x))
    return (x - x_hat).square().sum() / total


def explained_variance(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """1 - fvu."""
    return 1 - fvu(x, x_hat)


def cosine(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Mean over samples of x . x_hat / (|x| |x_hat|); a zero row counts 0."""
    return ratio((x * x_hat).sum(dim=1), x.norm(dim=1) * x_hat.norm(dim=1)).mean()


def relative_reconstruction_bias(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """E|x_hat|^2 / E[x . x_hat] (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated SAEs").

    The γ that makes x_hat / γ closest to x: 1 is unbiased, less is shrinkage. 0 where E[x . x_hat] = 0.
    """
    return ratio(x_hat.square().sum(), (x * x_hat).sum())


def l0(codes: SparseCodes, firing_threshold: float = 0.0) -> float:
    """Mean number of latents that fire, z > firing_threshold."""
    return float(density(codes, firing_threshold).sum())


def l1(codes: SparseCodes) -> float:
    """Mean over samples of Σ_j z_j. For the norm-free value scale the codes by the decoder's norms first."""
    return float(column_sums(codes).sum()) / max(len(codes), 1)


def density(codes: SparseCodes, firing_threshold: float = 0.0) -> Float[Tensor, " d_sae"]:
    """Share of samples on which each latent fires; its log10 makes the feature-density histogram."""
    return firing_counts(codes, firing_threshold) / max(len(codes), 1)


def dead(density: Float[Tensor, " d_sae"]) -> float:
    """Share of latents that never fire on the evaluation set."""
    return float((density == 0).double().mean())


def dense(density: Float[Tensor, " d_sae"]) -> float:
    """Share of latents that fire on more than a tenth of the evaluation set."""
    return float((density > DENSE_ABOVE).double().mean())


class Reconstruction:
    """All of this file over an evaluation set that comes in batches; any batch size gives the same numbers.

    Codes are multiplied by the norms of their decoder rows. Sums are kept in float64, the variance of x
    around a running mean (Chan et al. 1983): a large mean costs no digits.
    """

    def __init__(self, W_dec: Matrix, firing_threshold: float = 0.0) -> None:
        self.decoder_norms = row_norms(W_dec)
        device = self.decoder_norms.device
        self.firing_threshold, self.n_samples = firing_threshold, 0
        self.mean_x = torch.zeros(W_dec.shape[1], dtype=torch.float64, device=device)
        self.firings = torch.zeros_like(self.decoder_norms)
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def update(
        self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], codes: SparseCodes | Matrix
    ) -> None:
        """Adds a batch: the activations, their reconstruction, and the codes between them."""
        x, x_hat, z = as_tensor(x).double(), as_tensor(x_hat).double(), as_codes(codes)
        z = z.scaled(self.decoder_norms.to(z.values.dtype))
        self.firings += firing_counts(z, self.firing_threshold)

        n, m = self.n_samples, len(x)
        mean = x.mean(dim=0)
        between = (mean - self.mean_x).square().sum() * n * m / (n + m)
        self.mean_x += (mean - self.mean_x) * m / (n + m)
        self.n_samples += m
        product = (x * x_hat).sum(dim=1)
        self._sums += torch.stack(
            [
                (x - x_hat).square().sum(),
                (x - mean).square().sum() + between,
                x_hat.square().sum(),
                product.sum(),
                ratio(product, x.norm(dim=1) * x_hat.norm(dim=1)).sum(),
                column_sums(z).sum(),
            ]
        )

    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of samples on which each latent fired."""
        return self.firings / max(self.n_samples, 1)

    def compute(self) -> dict[str, float]:
        """mse, fvu, explained_variance, cosine, relative_reconstruction_bias, l0, l1, dead, dense.

        Raises:
            ValueError: the activations had no variance.
        """
        error, total, x_hat_square, product, cosines, magnitude = self._sums.tolist()
        _check_variance(total, self.n_samples)
        density = self.density()
        return {
            "mse": error / self.n_samples,
            "fvu": error / total,
            "explained_variance": 1 - error / total,
            "cosine": cosines / self.n_samples,
            "relative_reconstruction_bias": x_hat_square / product if product else 0.0,
            "l0": float(density.sum()),
            "l1": magnitude / self.n_samples,
            "dead": dead(density),
            "dense": dense(density),
        }


def _check_variance(total: float, n_samples: int) -> None:
    if total == 0:
        raise UsageError(f"fvu needs activations that vary, got {n_samples} identical rows; evaluate on more samples")
