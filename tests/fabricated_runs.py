"""Run directories made up through the real classes, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.config import TrainConfig
from sae.log import RunLog
from sae.metrics import match_dictionary
from sae.metrics.dictionary_recovery import dictionary_scores
from sae.model import SAE

N_STEPS = 600


def fabricate(
    out: Path,
    *,
    sae: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    n_features: int = 64,
    d_in: int = 16,
    n_missed: int = 3,
    noise: float = 0.02,
    known: bool = True,
    seed: int = 0,
) -> Path:
    """A run directory as training leaves it; W_dec is the truth with noise, some features missed."""
    stream = torch.Generator().manual_seed(seed)
    truth = torch.randn(n_features, d_in, generator=torch.Generator().manual_seed(9))
    truth /= truth.norm(dim=1, keepdim=True)
    config = TrainConfig(
        source=source or {"kind": "toy", "n_features": n_features, "d_hidden": d_in},
        sae=sae or {"kind": "topk", "d_sae": n_features, "k": 3},
        train={"n_samples": N_STEPS * 2048, "seed": seed},
        out=out,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")

    model = SAE(d_in, config.sae)
    model.initialise_(torch.zeros(d_in), stream)
    order = torch.randperm(config.sae.d_sae, generator=stream)[: n_features - n_missed]
    with torch.no_grad():
        model.W_dec[order] = truth[: len(order)] + noise * torch.randn(len(order), d_in, generator=stream)
    if getattr(model.sparsifier, "threshold", None) is not None:
        model.sparsifier.threshold.fill_(0.1)
    model.save(out)

    frequency = torch.rand(config.sae.d_sae, generator=stream) * 0.004 + 0.008
    frequency[-2:] = 0
    matching = match_dictionary(model.W_dec.detach(), truth, frequency > 0)
    scores = dictionary_scores(matching)
    tables = {"latent/frequency": frequency, "latent/purity": torch.rand(config.sae.d_sae, generator=stream)}
    result = {"metrics/fvu": 0.07, "metrics/l0": 2.57, "metrics/dead": 2 / config.sae.d_sae}
    if known:
        result |= {"polysemanticity/latent_purity": 0.97, "polysemanticity/neuron_purity": 0.08}
        tables |= _feature_tables(truth, matching.latent, matching.cosine, stream) | {
            "feature/nearest_latent": matching.nearest_latent,
            "feature/nearest_latent_cosine": matching.nearest_cosine.float(),
        }
        result |= {f"recovery/{name}": value for name, value in scores.items()}
        result |= {"recovery/mcc_chance": 0.329, "recovery/mcc_chance_sd": 0.003, "recovery/mcc_truth": 1.0}
        result |= {"recovery/f1": 0.78}
    save_file({name: tensor.contiguous() for name, tensor in tables.items()}, out / "evaluation.safetensors")
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")

    log = RunLog(out, config)
    for step in range(50, N_STEPS + 1, 50):
        share = 1 - 0.985 ** (step / 10)
        line = {
            "losses/overall_loss": 1.05 - share,
            "metrics/l0": 2 + 60 * (1 - share),
            "metrics/fvu": 1.05 - share,
        }
        log.line(step, line | ({"recovery/mcc": 0.33 + (scores["mcc"] - 0.33) * share} if known else {}))
    log.close()
    return out


def _feature_tables(truth: Tensor, latent: Tensor, cosine: Tensor, stream: torch.Generator) -> dict[str, Tensor]:
    n = len(truth)
    cosines = (truth @ truth.T).fill_diagonal_(-2)
    f1 = (cosine.float() - 0.2 + 0.05 * torch.randn(n, generator=stream)).clamp(0, 1)
    return {
        "truth": truth,
        "feature/frequency": torch.rand(n, generator=stream) * 0.004 + 0.008,
        "feature/magnitude": torch.rand(n, generator=stream) * 0.1 + 0.5,
        "feature/matched_latent": latent,
        "feature/matched_cosine": cosine.float(),
        **{f"feature/{name}": f1.clone() for name in ("precision", "recall", "f1", "auroc", "r2", "shrinkage")},
        "feature/nearest_feature": cosines.argmax(dim=1),
        "feature/nearest_feature_cosine": cosines.max(dim=1).values,
        "feature/found": cosine > 0.9,
    }


def fabricate_demo(out: Path, *, n_seeds: int = 2, **options: Any) -> Path:
    """The directory of a demo: the first TopK, its siblings, and the summary of all methods."""
    d_sae = options.get("n_features", 64)
    kinds = {
        "topk": ({"kind": "topk", "d_sae": d_sae, "k": 3}, 0.02),
        "batchtopk": ({"kind": "batchtopk", "d_sae": d_sae, "k": 2.56}, 0.06),
        "l1": ({"kind": "relu", "d_sae": d_sae, "l1_coefficient": 0.15}, 0.04),
        "l1_low": ({"kind": "relu", "d_sae": d_sae, "l1_coefficient": 0.05}, 0.15),
    }
    rows: list[dict[str, Any]] = []
    for method, (sae, noise) in kinds.items():
        for seed in range(n_seeds):
            folder = out if (method, seed) == ("topk", 0) else out / f"{method}-{seed}"
            fabricate(folder, sae=sae, noise=noise, seed=seed, **options)
            result = json.loads((folder / "result.json").read_text())
            rows.append({"method": method, "seed": seed, **result, "seconds": 9.1 + seed})
    for method, mcc in {"random": 0.328, "oracle": 1.0, "pca": 0.24, "ica": 0.42}.items():
        row = {"method": method, "seed": 0, "recovery/mcc": mcc, "recovery/mcc_chance": 0.329}
        rows.append(row | {"seconds": 0.4})
    (out / "summary.json").write_text(json.dumps(rows), encoding="utf-8")
    return out
