"""Other ways to a dictionary and to codes, measured by the same metrics as SAEs.

random                directions drawn at random, each activation coded by its k largest projections
oracle, oracle_k      the true features, coded by non-negative sparse coding: free, and limited to k
topk_oracle, ...      a trained SAE's dictionary, coded likewise: what its own encoder loses
pca, ica              at most d_in components, each as a pair of latents of opposite sign
dictionary_learning   scikit-learn's MiniBatchDictionaryLearning with non-negative codes
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import SparseCodes
from sae.errors import UsageError
from sae.metrics import match_dictionary
from sae.sources import HeldOut
from sae.sparsifiers import TopK
from toymodels.sparse_coding import select_penalty, sparse_code
from toymodels.streams import generator

# Tried penalties of sparse coding, as shares of the median row's largest projection.
PENALTIES = torch.logspace(-2, -0.3, 8)

Codes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Baseline:
    """A dictionary and a function from x - b_dec to codes z >= 0; x_hat = z W_dec + b_dec."""

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    code: Codes

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """Its codes."""
        z = self.code(x - self.b_dec)
        return SparseCodes.where(z > 0, z)

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Float[Tensor, "batch d_in"]:
        """z W_dec + b_dec."""
        return codes.decode(self.W_dec) + self.b_dec

    def pre_latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Correlation with each direction: what any selection would start from."""
        return (x - self.b_dec) @ self.W_dec.T


@dataclass(frozen=True)
class SparseCoding:
    """Non-negative sparse coding whose penalty and firing threshold were chosen on validation data."""

    dictionary: Float[Tensor, "d_sae d_in"]
    penalty: float
    threshold: float
    k: int | None = None

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        z = sparse_code(x, self.dictionary, self.penalty, k=self.k)
        return z * (z > self.threshold)


def sparse_coding(
    dictionary: Float[Tensor, "d_sae d_in"],
    truth: Float[Tensor, "n_features d_in"],
    validation: HeldOut,
    k: int | None = None,
    b_dec: Float[Tensor, " d_in"] | None = None,
) -> Baseline:
    """The best codes that a dictionary allows; with the true one this is the oracle.

    Penalty and threshold maximise the macro F1 of the latents matched to the true features on `validation`.
    """
    assert validation.acts is not None, "validation data must come with the true activations"
    centre = torch.zeros(dictionary.shape[1]) if b_dec is None else b_dec
    latent = match_dictionary(dictionary, truth).latent
    matched = latent >= 0
    # In the order of the features; a latent without a feature comes after them, where it may still explain.
    rest = torch.ones(len(dictionary), dtype=torch.bool)
    rest[latent[matched]] = False
    order = torch.cat([latent[matched], rest.nonzero().squeeze(1)])
    fires = validation.acts.dense()[:, matched.cpu()]
    fires = torch.nn.functional.pad(fires, (0, len(order) - fires.shape[1]))
    x = validation.x - centre
    # Smaller penalties than these buy no F1, and cost a dictionary that is off its truth very long supports.
    penalties = (PENALTIES * (x @ dictionary.T).amax(dim=1).median()).tolist()
    choice = select_penalty(x, fires, dictionary[order], penalties=penalties, k=k)
    return Baseline(dictionary, centre, SparseCoding(dictionary, choice.penalty, choice.threshold, k))


def random_dictionary(d_sae: int, mean: Float[Tensor, " d_in"], k: int, seed: int) -> Baseline:
    """Random unit directions, each activation coded by its k largest projections: what chance looks like."""
    rows = torch.randn(d_sae, len(mean), generator=generator(seed, "random dictionary"))
    rows /= rows.norm(dim=1, keepdim=True)
    return Baseline(rows, mean, lambda x: TopK(k)(x @ rows.T).dense())


def pca(x: Float[Tensor, "batch d_in"]) -> Baseline:
    """Principal components, d_in of them, with both signs."""
    mean = x.mean(dim=0)
    components = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.T.flip(0)
    return _signed_pairs(components, components, mean)


def ica(x: Float[Tensor, "batch d_in"], seed: int) -> Baseline:
    """Independent components (scikit-learn's FastICA), d_in of them, with both signs."""
    require_sklearn()
    from sklearn.decomposition import FastICA  # noqa: PLC0415

    model = FastICA(whiten="unit-variance", max_iter=500, tol=1e-3, random_state=seed).fit(x.numpy())
    unmixing, mixing = (torch.from_numpy(m).float() for m in (model.components_, model.mixing_.T))
    return _signed_pairs(mixing, unmixing, torch.from_numpy(model.mean_).float())


def dictionary_learning(
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
    truth: Float[Tensor, "n_features d_in"],
    validation: HeldOut,
    k: int,
    seed: int,
) -> Baseline:
    """scikit-learn's MiniBatchDictionaryLearning (Mairal et al. 2009), non-negative codes, coded with at most k."""
    require_sklearn()
    from sklearn.decomposition import MiniBatchDictionaryLearning  # noqa: PLC0415
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    mean = x.mean(dim=0)
    model = MiniBatchDictionaryLearning(
        d_sae,
        alpha=0.2 * float((x - mean).norm(dim=1).median()),
        batch_size=512,
        max_iter=1,
        fit_algorithm="cd",
        transform_max_iter=50,
        positive_code=True,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # Fifty rounds leave its codes a little short of their tolerance, which the dictionary does not feel.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((x - mean).double().numpy())
    rows = torch.from_numpy(model.components_).float()
    return sparse_coding(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12), truth, validation, k, mean)


def _signed_pairs(
    directions: Float[Tensor, "n d_in"], read_out: Float[Tensor, "n d_in"], mean: Float[Tensor, " d_in"]
) -> Baseline:
    norms = directions.norm(dim=1, keepdim=True)
    rows, read_out = directions / norms, read_out * norms

    def code(x: Tensor) -> Tensor:
        signed = x @ read_out.T
        return torch.cat([signed, -signed], dim=1).relu()

    return Baseline(torch.cat([rows, -rows]), mean, code)


def require_sklearn() -> None:
    """Names the remedy when the extra is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("scikit-learn is not installed; pip install 'sae[baselines]'")
