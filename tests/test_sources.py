from itertools import islice

import numpy as np
import pytest
import torch

import sae
from sae import UsageError, sources
from sae.arrays import Rows, rebatch
from sae.sources import ArraySource, IterableSource, as_source
from sae.world_source import ToySourceConfig


def numbered(n: int, d: int = 3) -> torch.Tensor:
    """Rows that say which they are."""
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, d).contiguous()


def small_blocks(monkeypatch, rows: int, window_blocks: int) -> None:
    """As if a set of a few rows were too large for memory."""
    monkeypatch.setattr(sources, "EXACT_SHUFFLE_BYTES", 0)
    monkeypatch.setattr(sources, "BLOCK_BYTES", rows * 12)
    monkeypatch.setattr(sources, "WINDOW_BYTES", rows * 12 * window_blocks)


@pytest.mark.parametrize("blocks", [False, True])
def test_an_epoch_visits_each_training_row_once(monkeypatch, blocks):
    if blocks:
        small_blocks(monkeypatch, rows=7, window_blocks=5)
    source = ArraySource(Rows([numbered(400)], ["x"]))
    n = source.n_training_rows
    epochs = torch.cat(list(islice(source.batches(20, seed=0), 2 * n // 20 + 1)))[:, 0].int().tolist()
    first, second = epochs[:n], epochs[n : 2 * n]
    held = [source.held_out(purpose, 400).x[:, 0].int().tolist() for purpose in ("calibration", "evaluation")]
    assert sorted(first + held[0] + held[1]) == list(range(400))
    assert sorted(first) == sorted(second)
    assert first != second != sorted(second)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_batch_depends_on_seed_and_number_alone(monkeypatch, blocks):
    if blocks:
        small_blocks(monkeypatch, rows=7, window_blocks=3)
    source = ArraySource(Rows([numbered(300)], ["x"]))
    whole = list(islice(source.batches(32, seed=1), 40))
    for start in (0, 1, 8, 25):
        for ours, theirs in zip(source.batches(32, seed=1, start=start), whole[start : start + 5], strict=False):
            assert torch.equal(ours, theirs)
    assert not torch.equal(next(source.batches(32, seed=2)), whole[0])


def test_blocks_mix_rows_from_far_apart(monkeypatch):
    small_blocks(monkeypatch, rows=10, window_blocks=8)
    source = ArraySource(Rows([numbered(4000)], ["x"]))
    batch = next(source.batches(64, seed=0))[:, 0]
    assert batch.std() > 500  # a run of neighbours would have about 18, all rows together 1155


def test_bad_rows_far_into_a_large_file_are_named_when_they_come(monkeypatch):
    small_blocks(monkeypatch, rows=10, window_blocks=2)
    x = numbered(400)
    x[333, 1] = torch.nan
    source = ArraySource(Rows([x], ["acts.npy"]))
    with pytest.raises(UsageError, match=r"acts\.npy row 333 holds NaN"):
        list(islice(source.batches(10, seed=0), 40))


def test_a_toy_is_an_endless_stream_with_known_features():
    config = ToySourceConfig(n_features=12, d_hidden=5, feature_prob=0.1, n_steps=50)
    source = config.open()
    x, acts, _ = source.held_out("evaluation", 100)
    torch.testing.assert_close(x, acts.dense() @ source.truth)
    again = config.open()
    assert torch.equal(again.truth, source.truth)
    assert torch.equal(next(again.batches(8, seed=3, start=7)), next(islice(source.batches(8, seed=3), 7, None)))
    assert not torch.equal(next(source.batches(8, seed=3)), next(source.batches(8, seed=4)))
    assert not torch.equal(source.held_out("calibration", 100).x, x)


@pytest.mark.parametrize("n_pieces", [1, 3, 50])
def test_rebatch_keeps_rows_and_order(n_pieces):
    x = numbered(100)
    batches = list(rebatch(x.tensor_split(n_pieces), 16))
    assert [len(batch) for batch in batches] == [16] * 6
    assert torch.equal(torch.cat(batches), x[:96])


def test_batches_may_have_more_axes(monkeypatch):
    """As a language model gives them: [sequence, position, d]."""
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 20)
    source = as_source(iter(numbered(60).view(5, 3, 4, 3)))
    assert torch.equal(next(source.batches(40, seed=0)), numbered(60)[20:])
    pairs = as_source(iter([(part, part[..., :2]) for part in numbered(60).numpy().reshape(5, 3, 4, 3)]))
    x, target = next(pairs.batches(40, seed=0))
    assert torch.equal(x, numbered(60)[20:])
    assert torch.equal(target, numbered(60)[20:, :2])


def test_a_target_of_other_axes_is_refused(monkeypatch):
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 20)
    with pytest.raises(UsageError, match=r"batch 0 of the source has a target with other axes: \[\(3, 4\), \(4, 3\)\]"):
        as_source(iter([(torch.zeros(3, 4, 2), torch.zeros(4, 3, 2))]))


def test_an_iterable_holds_its_first_rows_out_and_starts_again(monkeypatch):
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 20)

    class Loader:
        def __iter__(self):
            return iter(numbered(50).numpy().reshape(5, 10, 3))

    source = as_source(Loader())
    assert source.held_out("calibration", 99).x[:, 0].tolist() == list(range(10))
    assert source.held_out("evaluation", 99).x[:, 0].tolist() == list(range(10, 20))
    seen = torch.cat(list(islice(source.batches(12, seed=0), 5)))[:, 0].tolist()
    assert seen == [*range(20, 50), *range(20, 50)]
    again = list(islice(as_source(Loader()).batches(12, seed=0, start=3), 2))
    assert torch.cat(again)[:, 0].tolist() == seen[36:]


def test_a_generator_ends(monkeypatch):
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 10)
    source = as_source(row for row in numbered(50).split(10))
    assert len(list(source.batches(16, seed=0))) == 2


def test_an_iterable_that_shuffles_would_leak_and_is_refused(monkeypatch):
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 20)

    class Shuffled:
        def __iter__(self):
            return iter(numbered(60)[torch.randperm(60)].split(10))

    with pytest.raises(UsageError, match="different order each epoch"):
        list(islice(as_source(Shuffled()).batches(10, seed=0), 20))


def test_an_iterable_of_held_out_rows_only_ends(monkeypatch):
    monkeypatch.setattr(IterableSource, "N_HELD_OUT", 50)

    class Loader:
        def __iter__(self):
            return iter([[rows] for rows in numbered(50).split(10)])

    assert list(as_source(Loader()).batches(10, seed=0)) == []


def test_held_out_rows_of_large_files_are_checked_too(monkeypatch):
    small_blocks(monkeypatch, rows=10, window_blocks=2)
    clean = ArraySource(Rows([numbered(400)], ["x"]))
    row = int(clean.held_out("evaluation", 1).x[0, 0])
    x = numbered(400)
    x[row, 0] = torch.nan
    with pytest.raises(UsageError, match=f"row {row} holds NaN"):
        ArraySource(Rows([x], ["acts.npy"])).held_out("evaluation", 100)


def test_what_cannot_be_a_source():
    with pytest.raises(UsageError, match="cannot train on int"):
        as_source(3)
    with pytest.raises(UsageError, match="cannot train on function; call it: what it yields can be passed"):
        as_source(lambda: numbered(50))
    with pytest.raises(UsageError, match="pass small sets as one tensor"):
        as_source(row for row in numbered(50).split(10))
    with pytest.raises(UsageError, match="at least 50"):
        as_source(numbered(5))
    with pytest.raises(UsageError, match=r"holds torch\.int64"):
        as_source(np.zeros((40, 3), dtype=np.int64))
    with pytest.raises(UsageError, match="true features have d_in=4"):
        ArraySource(Rows([numbered(50)], ["x"]), torch.zeros(6, 4))


def test_thresholds_are_fitted_on_more_rows_than_the_scale(tmp_path):
    source, asked = ToySourceConfig(n_features=12, d_hidden=5, feature_prob=0.1, n_steps=50).open(), []
    drawn = source.held_out
    source.held_out = lambda purpose, n: asked.append((purpose, n)) or drawn(purpose, n)
    config = sae.TrainConfig(
        sae={"kind": "batchtopk", "d_sae": 16, "k": 1.2}, train={"n_samples": 4096}, out=tmp_path / "run"
    )
    model = sae.train(config, source, report=False).sae
    assert asked[0] == ("calibration", 65_536)
    assert asked[-1] == ("calibration", 262_144)
    codes = model.encode(drawn("calibration", 262_144).x)
    assert codes.counts.double().mean() == pytest.approx(1.2, rel=1e-3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones((50, 3))[::-1], r"the source runs backwards through memory, strides \[-24, 8\]; pass a copy of it"),
        (np.ones((50, 3), dtype=">f8"), "the source holds >f8, the bytes of another machine; convert it to float64"),
        (np.ones((50, 3), dtype=np.longdouble), "it must be floating point, convert it to float32"),
        (np.ma.masked_array(np.ones((50, 3))), "the source is a masked array; pass the rows that are to be used"),
        (torch.ones(50, 3).to_sparse(), "the source is torch.sparse_coo; pass a dense tensor"),
        (torch.ones(50, 3, device="meta"), r"the source has no values \(meta\); pass a dense tensor"),
    ],
    ids=["backwards", "endian", "long", "masked", "sparse", "meta"],
)
def test_memory_that_cannot_be_read_as_rows(data, message):
    with pytest.raises(UsageError, match=message):
        as_source(data)
