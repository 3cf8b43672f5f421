"""Methods from scikit-learn: independent components, and dictionary learning."""

from __future__ import annotations

import logging
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline, signed_pairs
from sae.baselines.coding import sparse_coding
from sae.extras import require
from sae.held_out import HeldOut
from toymodels.geometry import unit_rows

logger = logging.getLogger("sae")

ICA_ROUNDS = 500


def ica(x: Float[Tensor, "batch d_in"], seed: int) -> Baseline:
    """Independent components (FastICA), d_in of them, with both signs."""
    require("sklearn", "baselines", "ica")
    from sklearn.decomposition import FastICA  # noqa: PLC0415
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    model = FastICA(whiten="unit-variance", max_iter=ICA_ROUNDS, tol=1e-3, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x.numpy())
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning("ica did not converge in %d rounds; its components are those of the last round", ICA_ROUNDS)
    unmixing, mixing = (torch.from_numpy(m).float() for m in (model.components_, model.mixing_.T))
    norms = torch.linalg.vector_norm(mixing, dim=1, keepdim=True)
    read_out = unmixing * norms
    return signed_pairs(mixing / norms, torch.from_numpy(model.mean_).float(), lambda x: x @ read_out.T)


def dictionary_learning(
    x: Float[Tensor, "batch d_in"],
    d_sae: int,
    truth: Float[Tensor, "n_features d_in"] | None,
    validation: HeldOut,
    k: int,
    seed: int,
) -> Baseline:
    """MiniBatchDictionaryLearning (Mairal et al. 2009), non-negative codes, coded with at most k."""
    require("sklearn", "baselines", "dictionary_learning")
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
    return sparse_coding(unit_rows(torch.from_numpy(model.components_).float()), truth, validation, k, mean)
