import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from sae import cli
from sae.trainer import Trainer

# Without a GPU, Triton's kernels run in its interpreter; it reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# With one, cuBLAS gives the same bits each time, as torch's deterministic mode demands.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The tensors of the tests are small: more threads only wait for each other.
torch.set_num_threads(1)


class Outcome(NamedTuple):
    """How the command line ended."""

    code: int
    out: str
    err: str

    def assert_refused(self, *parts: str) -> None:
        """One line that says what is wrong, and exit code 2."""
        assert self.code == 2
        assert self.err.startswith("sae: error: ")
        assert len(self.err.splitlines()) == 1
        assert "Traceback" not in self.err
        for part in parts:
            assert part in self.err


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """The console script, in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sae", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A language model of `transformers` on disk, and texts for it."""
    from tiny_language_model import make  # slow to import

    return make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def stopped_at(monkeypatch):
    """A context in which runs end, as by Ctrl-C, in front of the step of this number."""

    @contextmanager
    def at(step: int) -> Iterator[None]:
        real = Trainer.advance

        def advance(trainer: Trainer, *given: torch.Tensor) -> None:
            if trainer.n_steps_done == step:
                raise KeyboardInterrupt
            real(trainer, *given)

        monkeypatch.setattr(Trainer, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            yield
        monkeypatch.setattr(Trainer, "advance", real)

    return at
