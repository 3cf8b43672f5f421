"""Processes that train together, as `torchrun` would start them, each with its own output."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# Gloo asks for the machine's name otherwise, which a sandbox may not know.
LOCAL = {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
SAE = "import sys; sys.argv[0] = 'sae'; from sae.cli import main; main()"

Processes = list[subprocess.Popen]


class Ended(NamedTuple):
    """How one process ended."""

    code: int
    out: str
    err: str


def environment(rank: int, n: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {
        **os.environ,
        **{name: str(value) for name, value in own.items()},
        **LOCAL,
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def started(
    code: str,
    *words: object,
    n: int = 2,
    but: Mapping[int, tuple[object, ...]] | None = None,
    folders: Sequence[Path] = (),
) -> Processes:
    """n processes that run this code with these words; `but` are those of some that are given others. They may stand in
    different folders."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (but or {}).get(rank, words))],
            env=environment(rank, n, port),
            cwd=folders[rank] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def ended(processes: Processes, timeout: float = 300) -> list[Ended]:
    """Once all have; none is left behind."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *words) for process, words in zip(processes, told, strict=True)]
