"""Groups of members over the machines of a Ray cluster, which must all see the same files under the same paths."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from sae.stopping import Stop, stop_requested
from sae.sweep.group import Ended, Group, Logged, Tell, opener


def connect() -> None:
    """Joins the cluster, before signals are handled: Ray sets its own handlers as it starts."""
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init()


def on_machines(groups: Sequence[Group], tell: Tell, stop: Stop) -> None:
    """A task for each group: one core, and one GPU where its members train on one."""
    ray: Any = importlib.import_module("ray")
    tasks = {}
    for group in groups:
        on_gpu = any(member.config.train.device.startswith("cuda") for member in group.members)
        remote = ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=0)(train_there)
        tasks[remote.remote(group, os.getcwd())] = group
    waiting, stopping = list(tasks), False
    while waiting:
        if stop() and not stopping:
            stopping = True
            for task in waiting:
                ray.cancel(task)  # heard there as SIGINT: a checkpoint is written
        ended, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
        for task in ended:
            left = {member.name for member in tasks[task].members}
            try:
                for message in ray.get(task):
                    left.discard(message.name)
                    tell(message)
                reason = "its task told nothing of it"
            except Exception as error:  # whatever Ray raises for a task that was lost
                reason = f"its task was lost: {' '.join(str(error).split())[:300]}"
            for name in sorted(left):
                tell(Ended(name, "interrupted") if stopping else Ended(name, "failed", reason))


def train_there(group: Group, folder: str) -> list[Ended]:
    """The task: trains one group in the folder that the sweep was started in."""
    os.chdir(folder)
    logging.getLogger("sae").setLevel(logging.WARNING)
    ended: list[Ended] = []

    def tell(message: Logged | Ended) -> None:
        if isinstance(message, Ended):
            ended.append(message)

    with stop_requested() as stop:
        group.run(opener(), tell, stop)
    return ended
