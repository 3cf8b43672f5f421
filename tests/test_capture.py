"""Which steps are recorded, and when a recording is played. Graphs need a GPU: here what they hold is done instead."""

import sys
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from sae import TrainConfig, UsageError, capture, train  # noqa: E402
from sae.capture import Recorder, Recording  # noqa: E402
from sae.members import Members  # noqa: E402
from sae.trainer import Trainer  # noqa: E402
from tests.test_kernels_triton import DEVICE, _quick_interpreter  # noqa: E402, F401
from tests.test_kernels_triton_steps import BATCH, CASES, D_IN, batches, make_trainer, same_run  # noqa: E402


@dataclass
class Body:
    """In place of a graph."""

    replay: object


class Pretended(Recorder):
    """Its recordings do on the host what a graph does on the device, with the memory that a graph knows."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.recorded, self.played, self.n_slots = 0, 0, None

    def _record(self, given):
        trainer, kernels = self.trainer, self.kernels
        inputs, dead, begun = tuple(part.clone() for part in given), trainer.dead.clone(), []
        fits = kernels.n_slots if self.n_slots is None else self.n_slots
        n_codes = None if kernels.n_positive is None else torch.zeros((), dtype=torch.int64)

        def first() -> None:
            kernels.recording, kernels.n_slots = True, fits
            begun[:] = [trainer.begin(*inputs)]
            kernels.recording = False
            if n_codes is not None:
                n_codes.copy_(kernels.n_positive)

        def second() -> None:
            assert trainer.dead is dead, "a graph knows no other memory"
            self.played += 1
            trainer.finish(begun[0])

        self.recorded += 1
        return Recording(inputs, dead, (Body(first), Body(second)), n_codes, fits, [])


def pair(case: str) -> tuple[Trainer, Pretended, Trainer]:
    ours, judge = make_trainer(case, "triton", torch.float32), make_trainer(case, "reference", torch.float64)
    recorder = Pretended(ours)
    ours.recorder = recorder
    return ours, recorder, judge


@pytest.fixture
def soon(monkeypatch):
    """Recordings are made after two steps of a kind."""
    monkeypatch.setattr(capture, "WARM_UP_STEPS", 2)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("case", ["topk", "relu"])
def test_played_steps_are_the_steps(case):
    ours, recorder, judge = pair(case)
    for x in batches(D_IN, 2, 6 if case == "topk" else 16):
        ours.step(x)
        judge.step(x)
    if case == "topk":
        assert (recorder.recorded, recorder.played) == (1, 4)
    assert recorder.played >= 3  # a batch with more codes than the recording has slots for may come
    same_run(ours, judge)


@pytest.mark.usefixtures("soon")
def test_codes_that_do_not_fit_are_computed_anew():
    ours, recorder, judge = pair("relu")
    recorder.n_slots = 1
    for x in batches(D_IN, 2, 8):
        ours.step(x)
        judge.step(x)
    assert (recorder.recorded, recorder.played) == (2, 0), "each after two steps that were not"
    same_run(ours, judge)


@pytest.mark.usefixtures("soon")
def test_what_the_host_decides_chooses_the_recording():
    ours, recorder, _ = pair("topk")
    data = batches(D_IN, 2, 3)
    for x in data:
        ours.step(x)
    (recording,) = recorder.recordings.values()
    ours.dead = torch.arange(len(ours.dead), device=DEVICE)  # as many as before, but others
    ours.step(data[0])
    assert recording.dead[-1] == len(recording.dead) - 1, "the graph must learn of them"
    ours.dead = ours.dead[:0]
    for x in data:
        ours.step(x)
    assert recorder.recorded == 2
    ours.step(data[0][: BATCH - 1])  # a batch of another size comes once
    assert recorder.recorded == 2
    ours.sae.sparsifier.k = 2
    for x in data[:2]:
        ours.step(x)
    assert recorder.recorded == 2


@pytest.mark.usefixtures("soon")
def test_far_more_slots_than_codes_are_given_back():
    """As a penalty grows fewer latents fire; recorded steps, which ask nobody, would keep the slots of the first."""
    ours, recorder, judge = pair("relu")
    data = batches(D_IN, 2, 7)
    for x in data[:2]:
        ours.step(x)
        judge.step(x)
    recorder.n_slots = many = 64 * ours.engine.kernels.n_slots
    ours.engine.kernels.n_slots = many
    for x in data[2:5]:  # of another kind, now: two as they come, and one that is played
        ours.engine.kernels.n_slots = many
        ours.step(x)
        judge.step(x)
    assert (recorder.recorded, recorder.played, len(recorder.recordings)) == (1, 1, 0)
    for x in data[5:]:
        ours.step(x)
        judge.step(x)
    assert ours.engine.kernels.n_slots <= many // 16
    same_run(ours, judge)


def test_another_number_of_slots_is_another_kind_of_step():
    """It warms up before it is recorded, as kernels may be compiled for it."""
    _, recorder, _ = pair("relu")
    given = (batches(D_IN, 2, 1)[0],)
    before = recorder._key(given)
    recorder.kernels.n_slots *= 2
    assert recorder._key(given) != before


def test_the_recording_that_was_used_last_is_kept(monkeypatch):
    ours, recorder, _ = pair("topk")
    x, all_dead = batches(D_IN, 2, 1)[0], torch.arange(8, device=DEVICE)
    monkeypatch.setattr(capture, "WARM_UP_STEPS", 1)
    ours.step(x)
    for n_dead in (1, 1, 2, 2, 4, 4, 1, 8, 8):
        ours.dead = all_dead[:n_dead]
        ours.step(x)
    assert [key[1] for key in recorder.recordings] == [4, 1, 8]


@pytest.mark.usefixtures("soon")
def test_what_cannot_be_recorded_goes_on_as_it_comes(monkeypatch, caplog):
    ours, recorder, judge = pair("topk")
    tried = []

    def fails(given):
        tried.append(given)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand much more")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(recorder, "_record", fails)
    for x in batches(D_IN, 2, 5):
        ours.step(x)
        judge.step(x)
    assert len(tried) == 1
    (said,) = caplog.messages
    assert said == (
        "a step could not be recorded as a CUDA graph (CUDA out of memory. Tried to allocate 2 GiB): steps "
        "continue without, more slowly"
    )
    same_run(ours, judge)


# On a GPU graphs are graphs.

on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU to record on")
MOVED = {"matryoshka"}  # k changes at each look, so that no kind lasts


@on_a_gpu
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("case", CASES)
def test_recorded_on_a_gpu(case):
    ours, judge = make_trainer(case, "triton", torch.float32), make_trainer(case, "reference", torch.float64)
    for x, target in zip(batches(D_IN, 2, 12), batches(judge.sae.d_out, 3, 12), strict=True):
        targets = (target,) if "transcoder" in case else ()
        ours.step(x, *targets)
        judge.step(x, *targets)
    assert not ours.recorder.fails
    assert ours.recorder.recordings or case in MOVED
    same_run(ours, judge, 1e-4)


@on_a_gpu
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("case", ["topk", "batchtopk", "jumprelu"])
def test_members_on_a_gpu_end_with_the_bits_of_one_alone(case):
    alone, *together = (make_trainer(case, "triton", torch.float32) for _ in range(5))
    with Members(together) as members:
        for x in batches(D_IN, 2, 40):
            alone.step(x)
            assert members.step(together, x) == [None] * 4
    for other in together:
        for (name, weight), (_, its) in zip(alone.engine.state.weights(), other.engine.state.weights(), strict=True):
            assert torch.equal(weight, its), name


@on_a_gpu
def test_a_run_on_a_gpu_ends_with_its_bits(tmp_path):
    """From a source that a thread draws and pins, with recorded steps, to a file."""
    sections = {
        "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 50},
        "sae": {"kind": "jumprelu", "d_sae": 24, "l0": 2.0},
        "train": {"n_samples": 6400, "batch_size": 64, "device": "cuda"},
        "evaluation": {"n_samples": 500},
    }
    config = TrainConfig.model_validate(sections | {"out": tmp_path / "one"})
    one = train(config, report=False)
    other = train(config.model_copy(update={"out": tmp_path / "other"}), report=False)
    assert one.metrics == other.metrics
    assert torch.equal(one.sae.W_dec, other.sae.W_dec)


def test_autograd_is_not_recorded():
    ours, recorder, _ = pair("topk")
    assert recorder._can_be_recorded()
    ours.engine.by_autograd = True
    assert not recorder._can_be_recorded()


def test_without_cuda_nothing_is_recorded(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae.capture", None)  # to import it would fail
    trainer = make_trainer("topk", "triton", torch.float32)
    assert trainer.window.device.type == "cuda" or trainer.recorder is None


def test_out_of_memory_names_a_batch_size(monkeypatch):
    trainer = make_trainer("topk", "reference", torch.float32)

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    trainer.recorder = type("Full", (), {"play": full})
    x = torch.zeros(BATCH, D_IN, device=DEVICE)
    with pytest.raises(UsageError, match=r"a batch of 9 at d_sae=45 does not fit on cpu, nor would a smaller one"):
        trainer.step(x)
    monkeypatch.setattr(trainer, "window", type("On", (), {"device": torch.device("cuda:0")})())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    with pytest.raises(
        UsageError, match=r"\(1.0 of 80.0 GiB free\); lower train.batch_size to 4, or raise train.accumulate to 3"
    ):
        trainer.step(x)
