"""One epoch over a memory-mapped file that is larger than the memory allowed: rate, and peak anonymous memory."""

import resource
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

D_IN, N_ROWS, BATCH = 256, 300_000, 2048
EXACT_BYTES, LIMIT_BYTES = 2**26, 2**28


class Epoch(NamedTuple):
    seconds: float
    n_rows: int
    peak_growth: int


def status_bytes(name: str) -> int:
    """A size of this process: RssAnon, resident memory that no file backs; VmData, what it may write to."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def read_one_epoch(path: Path, window_bytes: int) -> Epoch:
    """Runs in a process of its own, which may not allocate LIMIT_BYTES more than it has at the start."""
    from sae import sources
    from sae.arrays import open_rows

    torch.set_num_threads(1)
    sources.EXACT_SHUFFLE_BYTES, sources.WINDOW_BYTES = EXACT_BYTES, window_bytes
    source = sources.ArraySource(open_rows(path))
    assert not source.exact
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + LIMIT_BYTES, resource.RLIM_INFINITY))
    before, samples, done = status_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(status_bytes("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    n_rows, began, stream = 0, time.perf_counter(), source.batches(BATCH, seed=0)
    while n_rows < source.n_training_rows:
        n_rows += len(next(stream))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return Epoch(seconds, n_rows, max(samples))


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "acts.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (N_ROWS, D_IN))
    random = np.random.default_rng(0)
    for start in range(0, N_ROWS, 10_000):
        rows[start : start + 10_000] = random.standard_normal((10_000, D_IN), dtype=np.float32)
    rows.flush()
    return path


@pytest.mark.parametrize("window_mib", [16, 64])
def test_streaming(benchmark, say, large_file, window_mib):
    size = large_file.stat().st_size
    assert size > LIMIT_BYTES

    def fresh_process() -> Epoch:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(read_one_epoch, large_file, window_mib * 2**20).result()

    epoch = benchmark.pedantic(fresh_process, rounds=1)
    rate = epoch.n_rows / epoch.seconds
    say(
        f"windows of {window_mib} MiB of a file of {size / 2**20:.0f} MiB: {rate:,.0f} rows/s, "
        f"{rate * D_IN * 4 / 1e9:.2f} GB/s, peak growth {epoch.peak_growth / 2**20:.0f} MiB anonymous "
        f"(limit {LIMIT_BYTES / 2**20:.0f})"
    )
    assert epoch.peak_growth < size
