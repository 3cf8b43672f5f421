"""Batches on their way to a device: the same ones in the same order. Streams are pretended, as there is no GPU."""

import threading
from contextlib import nullcontext

import pytest
import torch

from sae import UsageError, prefetch, sources
from sae.sources import as_source

CPU = torch.device("cpu")
X, Y = torch.arange(300.0).view(100, 3), torch.arange(200.0).view(100, 2)
SETS = {"alone": X, "in parts": [X[:60], X[60:]], "pairs": (X, Y), "batches": [X[:50], X[50:]] * 200}


@pytest.fixture(params=[0, 2**30], ids=["small device", "large device"])
def pretended_gpu(request, monkeypatch):
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (request.param, request.param))
    monkeypatch.setattr(torch.cuda, "set_device", indexed)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    return request.param


def indexed(device: torch.device) -> None:
    """As CUDA's own, which takes no device without a number."""
    assert device.index is not None


def parts(batch) -> tuple[torch.Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@pytest.fixture(params=[False, True], ids=["row by row", "in windows"])
def in_windows(request, monkeypatch):
    """Sets of more than 16 bytes count as large: blocks of five rows or fewer, windows of three blocks."""
    if request.param:
        monkeypatch.setattr(sources, "EXACT_SHUFFLE_BYTES", 16)
        monkeypatch.setattr(sources, "BLOCK_BYTES", 60)
        monkeypatch.setattr(sources, "WINDOW_BYTES", 180)


@pytest.mark.usefixtures("in_windows")
@pytest.mark.parametrize("name", SETS)
def test_the_same_batches(name, pretended_gpu):
    data = iter(SETS[name]) if name == "batches" else SETS[name]
    again = iter(SETS[name]) if name == "batches" else SETS[name]
    ours = prefetch.batches(as_source(data), 7, 3, 2, CPU)
    theirs = as_source(again).batches(7, 3, 2)
    n = 0
    for batch, expected in zip(ours, theirs, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(parts(batch), parts(expected), strict=True))
        n += 1
        if n == 40:
            break
    assert n == 40


def test_the_last_batch_comes(pretended_gpu):
    given = prefetch.batches(as_source(iter(SETS["batches"])), 1000, 0, 0, CPU)
    assert len(list(given)) == (200 * 100 - 8192) // 1000


def test_a_set_is_kept_on_the_device_where_it_fits(pretended_gpu):
    alone, pairs = as_source(X), as_source((X, Y))
    assert (prefetch._resident(alone, CPU).rows is not alone.rows) == bool(pretended_gpu)
    assert (prefetch._resident(pairs, CPU).rows.rows is not pairs.rows.rows) == bool(pretended_gpu)
    rows = prefetch._resident(as_source(SETS["in parts"]), CPU).rows
    assert len(rows.parts) == (1 if pretended_gpu else 2)


def test_bad_rows_are_told_where_a_set_is_kept(monkeypatch, in_windows):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(prefetch, "CHUNK_ROWS", 7)
    source = as_source(X.clone())
    source.rows.parts[0][41, 1] = torch.nan
    with pytest.raises(UsageError, match="row 41 holds NaN"):
        prefetch._resident(source, CPU)


def test_batches_are_drawn_on_another_thread_but_for_iterables(pretended_gpu, monkeypatch):
    seen = set()
    monkeypatch.setattr(prefetch, "_pinned", lambda batch: seen.add(threading.current_thread().name) or batch)
    for name, expected in (("alone", set() if pretended_gpu else {"batches_0"}), ("batches", {"MainThread"})):
        seen.clear()
        given = prefetch.batches(as_source(iter(SETS[name]) if name == "batches" else SETS[name]), 7, 0, 0, CPU)
        for _, _ in zip(range(3), given, strict=False):
            pass
        given.close()
        assert seen == expected
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_the_source_raises_comes_through(pretended_gpu):
    source = as_source(X.clone())
    given = prefetch._drawn(source, failing(), torch.device("cpu", 0))
    assert len(next(given)) == 7
    with pytest.raises(UsageError, match="broken"):
        next(given)


def failing():
    yield torch.zeros(7, 3)
    raise UsageError("broken")
