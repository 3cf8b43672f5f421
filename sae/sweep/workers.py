"""Groups of members over processes of this machine, each process with its part of the cores."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from sae.stopping import Stop, stop_requested
from sae.sweep.group import Ended, Group, Tell, opener
from toymodels.processes import child_environment, n_cores

logger = logging.getLogger("sae")


class _Worker:
    """A process that trains one group after the other."""

    def __init__(self, n_threads: int) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
        with child_environment(n_threads):
            self.process.start()
        theirs.close()
        self.left: set[str] = set()

    def give(self, group: Group) -> None:
        """Trains this group next; its members are `left` until they are reported to have ended."""
        self.left = {member.name for member in group.members}
        self.connection.send(group)


def in_processes(groups: Sequence[Group], n_jobs: int, tell: Tell, stop: Stop) -> None:
    """Runs all groups, n_jobs at a time. A process that is killed takes its own group with it, and no other."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    n_threads = int(threads) if threads.isdigit() else max(n_cores() // n_jobs, 1)
    waiting, stopping = list(groups), False
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            if stop() and not stopping:
                stopping = True
                for member in (member for group in waiting for member in group.members):
                    tell(Ended(member.name, "interrupted"))
                waiting.clear()
                for worker in workers:
                    worker.process.terminate()
            while waiting and len(workers) < n_jobs:
                workers.append(_Worker(n_threads))
                workers[-1].give(waiting.pop(0))
            for connection in wait([worker.connection for worker in workers], timeout=0.2):
                worker = next(worker for worker in workers if worker.connection is connection)
                if not _hear(worker, tell, stopping):
                    if waiting and worker.process.is_alive():
                        worker.give(waiting.pop(0))
                    else:
                        worker.connection.close()
                        worker.process.join()
                        workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.terminate()


def _hear(worker: _Worker, tell: Tell, stopping: bool) -> bool:
    """Passes one message on; False when the group has ended, or the process."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        for name in sorted(worker.left):
            if stopping:
                tell(Ended(name, "interrupted"))
            else:
                tell(Ended(name, "failed", "its process was killed; is there enough memory? --resume continues it"))
        return False
    if message is None:
        return False
    if isinstance(message, logging.LogRecord):
        logger.handle(message)
        return True
    if isinstance(message, Ended):
        worker.left.discard(message.name)
    tell(message)
    return True


class _Told(logging.Handler):
    """Sends what is logged to the parent, so that it does not disturb its progress bar."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        formatter = logging.Formatter()
        words = record.getMessage() + (f"\n{formatter.formatException(record.exc_info)}" if record.exc_info else "")
        self.connection.send(logging.makeLogRecord({"name": record.name, "levelno": record.levelno, "msg": words}))


def _work(connection: Connection, parent: int) -> None:
    """The process: trains what comes, until nothing more does or its parent is gone, which it may be by now."""
    logger.addHandler(_Told(connection))
    logger.propagate = False
    open_source = opener()
    with stop_requested() as stop:

        def stop_or_orphaned() -> int:
            # Members must not be trained on while a later `--resume` trains them too.
            return stop() or (signal.SIGTERM if os.getppid() != parent else 0)

        try:
            while not stop_or_orphaned():
                group: Group = connection.recv()
                group.run(open_source, connection.send, stop_or_orphaned)
                connection.send(None)
        except (EOFError, BrokenPipeError):
            return
