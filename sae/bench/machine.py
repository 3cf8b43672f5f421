"""What a measurement depends on and a reader cannot guess: hardware, threads, versions, load, date, command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Without its size in /sys, the last cache is taken to be larger than any.
UNKNOWN_CACHE_BYTES = 2**28


def synchroniser(device: str) -> Callable[[], object]:
    """Waits until the device has done what it was given; on a CPU there is nothing to wait for."""
    kind = torch.device(device).type
    if kind == "cpu":
        return lambda: None
    module = getattr(torch, kind)
    return lambda: module.synchronize(device)


def machine(device: str) -> dict[str, object]:
    """Everything of the machine that a number should be published with."""
    flags = {name: _flag(name) for name in ("amx_tile", "amx_fp16", "avx512_bf16", "avx512_vnni")}
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [name for name, supported in flags.items() if supported],
        "last_cache_bytes": last_cache_bytes(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "driver": next(iter(_lines(Path("/proc/driver/nvidia/version"))), None),
        "versions": {name: _version(name) for name in ("sae", "torch", "triton", "numpy")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "load": load(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cpu_model() -> str:
    """Its name as the kernel tells it."""
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_cache_bytes() -> int | None:
    """Size of the largest cache of the first core."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        (text,) = _lines(path)[:1] or [""]
        if text.rstrip("KM").isdigit():
            sizes.append(int(text.rstrip("KM")) * (2**20 if text.endswith("M") else 2**10))
    return max(sizes, default=None)


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes: above the number of threads, others were running too."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _flag(name: str) -> bool:
    """Torch's own answer to whether the CPU has these instructions; older versions have fewer answers."""
    asked = {"avx512_vnni": "vnni"}.get(name, name)
    answer = getattr(torch.cpu, f"_is_{asked}_supported", None)
    return bool(answer()) if answer is not None else False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
