"""Batches on their way to a device: the same ones in the same order. Streams are pretended, as there is no GPU."""

from contextlib import nullcontext

import pytest
import torch

from sae import prefetch
from sae.sources import as_source

CPU = torch.device("cpu")
X, Y = torch.arange(300.0).view(100, 3), torch.arange(200.0).view(100, 2)
SETS = {"alone": X, "in parts": [X[:60], X[60:]], "pairs": (X, Y), "batches": [X[:50], X[50:]] * 200}


@pytest.fixture(params=[0, 2**30], ids=["small device", "large device"])
def pretended_gpu(request, monkeypatch):
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (request.param, request.param))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    return request.param


def parts(batch) -> tuple[torch.Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


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
