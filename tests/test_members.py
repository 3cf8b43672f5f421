"""Members that step side by side train as they would alone, whatever runs beside them."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sae import SAE, TrainConfig
from sae.kernels.precision import products
from sae.members import Members
from sae.trainer import Trainer

BATCH, D_IN, D_SAE = 64, 13, 70
KINDS = [
    {"kind": "topk", "k": 5},
    {"kind": "batchtopk", "k": 2.3},
    {"kind": "relu", "l1_coefficient": 0.3},
    {"kind": "topk", "k": 3, "d_sae": 35},
    {"kind": "topk", "k": 5},
]


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def trainers(kernels: str, threads: int) -> list[Trainer]:
    made = []
    for seed, options in enumerate(KINDS):
        train = {"n_samples": 40 * BATCH, "batch_size": BATCH, "kernels": kernels, "dead_after_samples": 4 * BATCH}
        config = TrainConfig.model_validate({"sae": {"d_sae": D_SAE} | options, "train": train})
        sae = SAE(D_IN, config.sae)
        sae.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(seed))
        made.append(Trainer(sae, config, 1.3))
    torch.set_num_threads(threads)
    return made


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_together_is_alone(kernels):
    batches = torch.randn(40, BATCH, D_IN, generator=torch.Generator().manual_seed(2))
    alone = trainers(kernels, threads=1)
    for batch in batches:
        for member in alone:
            member.step(batch)
    together = trainers(kernels, threads=2)
    with Members(together) as members:
        assert members.pool is not None
        assert torch.get_num_threads() == 2
        for batch in batches:
            assert members.step(together, [batch] * len(together)) == [None] * len(KINDS)
    for ours, theirs in zip(together, alone, strict=True):
        for name, tensor in theirs.state()[0].items():
            assert torch.equal(ours.state()[0][name].nan_to_num(), tensor.nan_to_num()), name


@pytest.mark.parametrize("threads", [1, 2])
def test_a_members_error_is_told_and_stops_no_other(threads):
    made = trainers("native", threads)
    made[1].step = None
    with Members(made) as members:
        assert (members.pool is not None) == (threads == 2)
        errors = members.step(made, [torch.zeros(BATCH, D_IN)] * len(made))
    assert [type(error) for error in errors] == [type(None), TypeError, type(None), type(None), type(None)]
    assert [made[number].n_steps_done for number in (0, 2, 3, 4)] == [1, 1, 1, 1]


def test_some_of_the_members_step_and_those_given_up_are_free():
    made = trainers("native", threads=2)
    with Members(made) as members:
        members.step(made, [torch.zeros(BATCH, D_IN)] * len(made))
        members.step(made[:3], [torch.zeros(BATCH, D_IN)] * 3)
        members.step(made[:1], [torch.zeros(BATCH, D_IN)])
        assert [trainer.n_steps_done for trainer in made] == [3, 2, 2, 1, 1]
        gone = weakref.ref(made.pop())
        gc.collect()
        assert gone() is None


def test_the_last_of_several_steps_restores_the_precision_of_products():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    first, second = products("bf16"), products("bf16")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before


class OnCuda(Trainer):
    """A trainer that notes when it steps, and on which stream."""

    def __init__(self, notes, fails=False):
        self.notes, self.fails = notes, fails
        weight = SimpleNamespace(device=torch.device("cuda:0"))
        self.sae, self.engine = (
            SimpleNamespace(W_dec=weight),
            SimpleNamespace(kernels=SimpleNamespace(precision="bf16")),
        )

    def step(self, *batch):
        self.notes.append(("step", self))
        if self.fails:
            raise ValueError("no")


def test_on_cuda_each_has_a_stream_and_waits_for_the_batch(monkeypatch):
    notes, streams = [], []

    class Stream:
        def wait_stream(self, other):
            notes.append(("wait", self, other))

    @contextmanager
    def stream(which):
        notes.append(("enter", which))
        yield
        notes.append(("leave", which))

    here, X = Stream(), torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(Stream()) or streams[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    one, two = OnCuda(notes, fails=True), OnCuda(notes)
    with Members([one, two]) as members:
        (first, second), expected = streams, []
        assert [type(error) for error in members.step([one, two], [X, X])] == [ValueError, type(None)]
        for own, trainer in ((first, one), (second, two)):
            expected += [("wait", own, here), ("enter", own), ("step", trainer), ("leave", own)]
        assert notes == [*expected, ("wait", here, first), ("wait", here, second)]
        notes.clear()
        members.step([two], [X])  # also when it is the last one: its memory is that stream's
        assert notes == [*expected[4:], ("wait", here, second)]
    notes.clear()
    with Members([one]) as members:
        members.step([one], [X])
    assert notes == [("step", one)]


def test_every_thread_starts_at_once_and_others_keep_their_number():
    """A thread that starts later would set the number that all threads to come begin with."""
    torch.set_num_threads(8)
    with Members(trainers("torch", threads=8)) as members:
        assert members.pool is not None
        assert len(members.pool._threads) == len(KINDS)
        numbers = set(members.pool.map(lambda _: torch.get_num_threads(), range(50)))
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 8
    assert numbers == {8 // len(KINDS)}
