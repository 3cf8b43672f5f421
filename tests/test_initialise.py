"""Where thresholds start."""

import pytest
import torch

from sae import SAE, HeldOut, SparseCodes, Sparsifier, TrainConfig
from sae.config import SAEConfig
from sae.initialise import cuts
from sae.sources import as_source
from sae.start import start


def make_sae(d_sae: int) -> SAE:
    sae = SAE(6, SAEConfig.of_kind({"kind": "relu", "d_sae": d_sae}))
    sae.initialise_(torch.full((6,), 0.3), torch.Generator().manual_seed(0))
    return sae


@pytest.mark.parametrize("entries", [1, 700, 2**24])
def test_each_latent_fires_for_the_same_share(entries, monkeypatch):
    monkeypatch.setattr("sae.initialise.ENTRIES", entries)
    sae, x = make_sae(40), torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    fires = sae.pre_latents(x) > cuts(sae, x, 3.0)
    assert (fires.sum(dim=0) == 15).all()  # 200 * 3 / 40


def test_many_rows_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr("sae.initialise.N_ROWS", 100)
    sae, x = make_sae(40), torch.randn(1000, 6, generator=torch.Generator().manual_seed(1))
    x[:500] *= 10
    fires = sae.pre_latents(x[::10]) > cuts(sae, x, 4.0)
    assert (fires.sum(dim=0) == 10).all()


@pytest.mark.parametrize(("l0", "expected"), [(1e-9, 1), (40.0, 199)])
def test_at_least_one_row_fires_and_at_least_one_is_silent(l0, expected):
    sae, x = make_sae(40), torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    assert ((sae.pre_latents(x) > cuts(sae, x, l0)).sum(dim=0) == expected).all()


class Cut(Sparsifier):
    """Fires above a threshold of each latent that training does not move; half of it is a bias."""

    def __init__(self, initial_l0: float | None) -> None:
        super().__init__()
        self.initial_l0 = initial_l0
        self.register_buffer("threshold", torch.zeros(40))

    def start_(self, cuts: torch.Tensor, b_enc: torch.Tensor) -> None:
        self.threshold.copy_(cuts / 2)
        b_enc -= cuts / 2

    def forward(self, pre_latents: torch.Tensor) -> SparseCodes:
        return SparseCodes.where(pre_latents > self.threshold.clamp_min(0), pre_latents)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_run_starts_sparse_at_any_scale(scale, monkeypatch):
    x = scale * torch.randn(8000, 6, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(sae={"kind": "relu", "d_sae": 40})
    monkeypatch.setattr(type(config.sae), "build", lambda self: Cut(2.0))
    trainer = start(config, as_source(x), HeldOut(x))
    l0 = trainer.sae.sparsifier(trainer.sae.pre_latents(x / trainer.unit)).counts.double().mean()
    assert l0 == pytest.approx(2.0, rel=0.01)
    monkeypatch.setattr(type(config.sae), "build", lambda self: Cut(None))
    assert not start(config, as_source(x), HeldOut(x)).sae.sparsifier.threshold.any()
