"""Activations with targets: every source keeps the two sides of a row together."""

from itertools import islice

import numpy as np
import pytest
import torch

from sae import UsageError, sources
from sae.sources import ArraySource, ArraySourceConfig, IterableSource, PairSource, as_source


def numbered(n: int, d_in: int = 3, d_out: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that say which they are; the target of row i says -i."""
    rows = torch.arange(n, dtype=torch.float32)[:, None]
    return rows.expand(n, d_in).contiguous(), -rows.expand(n, d_out).contiguous()


def belong(x: torch.Tensor, target: torch.Tensor) -> None:
    assert (x.shape[1], target.shape[1]) == (3, 2)
    assert torch.equal(x[:, :1].expand(len(x), 3), x)
    assert torch.equal(-x[:, :1].expand(len(x), 2), target)
    assert x.is_contiguous()
    assert target.is_contiguous()


def small_blocks(monkeypatch) -> None:
    """As if a set of a few rows were too large for memory."""
    monkeypatch.setattr(sources, "EXACT_SHUFFLE_BYTES", 0)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 7 * 20)
    monkeypatch.setattr(sources, "WINDOW_BYTES", 7 * 20 * 5)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_arrays_are_shuffled_together(monkeypatch, blocks, parts):
    if blocks:
        small_blocks(monkeypatch)
    x, y = numbered(400)
    source = as_source(([x[:90], x[90:]], [y[:300].numpy(), y[300:].numpy()]) if parts else (x, y))
    assert (source.d_in, source.d_out) == (3, 2)
    n = source.rows.n_training_rows
    batches = list(islice(source.batches(20, seed=0), n // 20))
    for batch in batches:
        belong(*batch)
    held = [source.held_out(purpose, 400) for purpose in ("calibration", "evaluation")]
    for one in held:
        belong(one.x, one.target)
        assert one.wanted is one.target
    seen = torch.cat([*(x for x, _ in batches), *(one.x for one in held)])[:, 0].int().tolist()
    assert len(set(seen)) == len(seen) > 370
    assert seen[:100] != sorted(seen[:100])
    again = next(source.batches(20, seed=0, start=3))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, batches[3], strict=True))


def test_iterables_of_pairs(monkeypatch):
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 20)
    x, y = numbered(60)

    class Loader:
        def __iter__(self):
            return iter(list(zip(x.split(10), y.numpy().reshape(6, 10, 2), strict=True)))

    source = as_source(Loader())
    assert isinstance(source, PairSource)
    held = source.held_out("evaluation", 99)
    belong(held.x, held.target)
    batches = list(islice(source.batches(16, seed=0), 6))
    for batch in batches:
        belong(*batch)
    assert torch.cat([x for x, _ in batches])[:, 0].tolist() == [float(20 + i % 40) for i in range(96)]


def test_files_with_targets(tmp_path):
    x, y = (part.numpy() for part in numbered(100))
    np.save(tmp_path / "x-0.npy", x[:60])
    np.save(tmp_path / "x-1.npy", x[60:])
    np.savez(tmp_path / "out.npz", mlp=y, other=x)
    config = ArraySourceConfig(path=tmp_path / "x-*.npy", target=tmp_path / "out.npz", target_key="mlp")
    source = config.open()
    belong(*next(source.batches(32, seed=0)))
    assert isinstance(ArraySourceConfig(path=tmp_path / "x-0.npy").open(), ArraySource)


def test_rows_may_be_stored_in_different_precisions(monkeypatch):
    x, y = numbered(200)
    for blocks in (False, True):
        if blocks:
            small_blocks(monkeypatch)
        batch = next(as_source((x.half(), y - 2**-12)).batches(32, seed=0))  # too fine for float16
        assert [part.dtype for part in batch] == [torch.float32] * 2
        belong(batch[0], batch[1] + 2**-12)


@pytest.mark.parametrize("blocks", [False, True])
def test_what_cannot_be_a_target(monkeypatch, blocks, tmp_path):
    if blocks:
        small_blocks(monkeypatch)
    x, y = numbered(100)
    with pytest.raises(UsageError, match="the target has 99 rows, but the source has 100; each row needs its own"):
        as_source((x, y[:99]))
    bad = y.clone()
    bad[33, 1] = torch.inf
    with pytest.raises(UsageError, match="the target row 33 holds NaN or infinity"):
        list(islice(as_source((x, bad)).batches(10, seed=0), 40))
    with pytest.raises(UsageError, match=r"a tuple is \(activations, targets\), got 3 entries"):
        as_source((x, y, y))
    with pytest.raises(UsageError, match=r"the target holds torch\.int64"):
        as_source((x, y.long()))
    with pytest.raises(UsageError, match="the target is a str; it must be a tensor or an array"):
        as_source((x, "y.npy"))
    with pytest.raises(UsageError, match=r"batch 1 of the source has widths \[3\], but those before it \[3, 2\]"):
        as_source(iter([(x, y), x]))
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    np.save(tmp_path / "truth.npy", np.eye(3, dtype=np.float32))
    files = {"path": tmp_path / "x.npy", "target": tmp_path / "y.npy"}
    with pytest.raises(UsageError, match="true features have d_in=3, targets have d_out=2"):
        ArraySourceConfig(**files, truth=tmp_path / "truth.npy").open()
    with pytest.raises(ValueError, match="target_key 'mlp' names an array in target, which is not given"):
        ArraySourceConfig(path=tmp_path / "x.npy", target_key="mlp")
