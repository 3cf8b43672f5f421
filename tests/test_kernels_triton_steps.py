"""Whole training steps of every kind with Triton's kernels, against the reference in float64; and who gets them."""

import json
import logging
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.interpreter import GridExecutor  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from sae import SAE, SparseCodes, TrainConfig, UsageError  # noqa: E402
from sae import kernels as kernels_module  # noqa: E402
from sae.kernels import choose, for_inference, resolve_device  # noqa: E402
from sae.kernels.triton import Triton, launch  # noqa: E402
from sae.sparsifiers import JumpReLU  # noqa: E402
from sae.trainer import Trainer  # noqa: E402
from tests.test_kernels_triton import DEVICE, _quick_interpreter  # noqa: E402, F401
from tests.test_recording import WAITS  # noqa: E402

BATCH, D_IN, D_SAE, STEPS = 9, 11, 45, 3
CPU = torch.device("cpu")
TRITON = Path(__file__).parent.parent / "sae" / "kernels" / "triton"
CASES = {
    "topk": {"kind": "topk", "k": 4},
    "free rows": {"kind": "topk", "k": 4, "unit_norm_decoder": False},
    "multi_k": {"kind": "topk", "k": 3, "multi_k": 7},
    "prefixes": {"kind": "topk", "k": 4, "prefixes": (5, 20, D_SAE)},
    "own centre": {"kind": "topk", "k": 4, "tied_bias": False},
    "batchtopk": {"kind": "batchtopk", "k": 2.3},
    "matryoshka": {"kind": "matryoshka", "k": 2.3, "k_start": 6.0, "k_anneal_fraction": 0.8},
    "relu": {"kind": "relu", "l1_coefficient": 0.3, "l0": 4.0},
    "relu free": {"kind": "relu", "l1_coefficient": 0.3, "unit_norm_decoder": False},
    "jumprelu": {"kind": "jumprelu", "l0": 4.0},
    "jumprelu tanh": {"kind": "jumprelu", "penalty": "tanh", "l0_coefficient": 0.3, "unit_norm_decoder": False},
    "gated": {"kind": "gated", "l0": 4.0},
    "gated free": {"kind": "gated", "l0": 4.0, "unit_norm_decoder": False},
    "p_annealing": {"kind": "p_annealing", "l0": 4.0, "anneal_start": 0.0},
    "transcoder": {"kind": "transcoder", "k": 4},
    "skip_transcoder": {"kind": "skip_transcoder", "k": 4},
    "matching_pursuit": {"kind": "matching_pursuit", "k": 3},
    "refined": {"kind": "topk", "k": 4, "refine": 0.5},
    "refined batchtopk": {"kind": "batchtopk", "k": 2.3, "refine": 0.5, "tied_bias": False},
    "refined prefixes": {"kind": "matryoshka", "k": 2.3, "refine": 0.5},
    "sorted prefixes": {"kind": "lista_matryoshka", "k": 2.3},
}


def make_trainer(case: str, kernels: str, dtype: torch.dtype) -> Trainer:
    """Eleven latents are dead when it begins, so that AuxK has something to do; ReLU's steps are sparse."""
    options = {"d_sae": D_SAE, "aux_k": 3, "aux_coefficient": 0.1} | CASES[case]
    train = {"n_samples": 40 * BATCH, "batch_size": BATCH, "warmup_steps": 5, "kernels": kernels, "precision": "fp32"}
    config = TrainConfig.model_validate({"sae": options, "train": train | {"dead_after_samples": 4 * BATCH}})
    d_out = 6 if "transcoder" in case else D_IN
    if d_out != D_IN:
        options |= {"tied_init": False}
        config = TrainConfig.model_validate({"sae": options, "train": train | {"dead_after_samples": 4 * BATCH}})
    sae = SAE(D_IN, config.sae, d_out)
    sae.initialise_(torch.zeros(d_out), torch.Generator().manual_seed(0), torch.zeros(D_IN))
    if sae.encoder is not sae.W_dec:  # a lone code that is optimal has no gradient but what rounding leaves
        sae.encoder.data *= 1.1
    sae.sparsifier.start_(torch.full((D_SAE,), 1.2), sae.b_enc.detach())
    if "gated" in case:  # a magnitude without a gate must not count
        sae.sparsifier.c_mag.data.fill_(0.2)
    trainer = Trainer(sae.to(dtype).to(DEVICE), config, 1.3)
    trainer.engine.dense = False
    trainer.engine.state.silent_samples[-11:] = 10 * BATCH
    return trainer


def batches(d: int, seed: int, n: int = STEPS) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, d, generator=stream).to(DEVICE) for _ in range(n)]


def same_run(ours: Trainer, judge: Trainer, tolerance: float = 1e-5) -> None:
    for (name, weight), (_, other) in zip(ours.engine.state.weights(), judge.engine.state.weights(), strict=True):
        torch.testing.assert_close(weight.double(), other, rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")
    torch.testing.assert_close(ours.window, judge.window, rtol=1e-5, atol=1e-6)
    for name in ("silent_samples", "window_firing"):
        assert torch.equal(getattr(ours.engine.state, name), getattr(judge.engine.state, name))
    both = (trainer.sae.sparsifier.state_dict().items() for trainer in (ours, judge))
    for (name, own), (_, other) in zip(*both, strict=True):
        close = {"rtol": 1e-4, "atol": 1e-6, "equal_nan": True, "check_dtype": False}
        torch.testing.assert_close(own.double(), other.double(), **close, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("case", CASES)
def test_steps(case, monkeypatch):
    ours, judge = make_trainer(case, "triton", torch.float32), make_trainer(case, "reference", torch.float64)
    assert ours.engine.kernels.name == "triton"
    monkeypatch.setattr(ours.engine, "_by_autograd", None)  # to call it would fail
    monkeypatch.setattr(ours.engine, "_dense", None)
    for x, target in zip(batches(D_IN, 2), batches(judge.sae.d_out, 3), strict=True):
        targets = (target,) if "transcoder" in case else ()
        for trainer in (ours, judge):
            trainer.step(x, *targets)
    assert len(judge.dead) == 11
    assert judge.window[2] > 0, "AuxK must have had something to do"
    same_run(ours, judge)


@pytest.mark.parametrize("case", ["topk", "jumprelu"])
def test_clipped_steps_in_parts(case):
    ours, judge = make_trainer(case, "triton", torch.float32), make_trainer(case, "reference", torch.float64)
    for x in batches(D_IN, 2, 2):
        for trainer in (ours, judge):
            trainer.engine.n_parts, trainer.engine.clip_norm = 2, 0.05
            trainer.step(x)
    moments = torch.cat([moment.flatten() for moment in judge.engine.state.first.values()])
    assert 0.005 < moments.norm() < 0.01, "both must have been clipped"
    same_run(ours, judge)


class Asks(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number that is read, a size that follows from data, a number of
    the host that is copied there (`x[0] = 1` does, `x[:1].fill_(1)` does not)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in (*WAITS, "lift_fresh"), f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_the_host_asks_nothing_in_a_step_that_is_recorded(case, monkeypatch):
    trainer = make_trainer(case, "triton", torch.float32)
    (first, x), (_, target) = batches(D_IN, 2, 2), batches(trainer.sae.d_out, 3, 2)
    targets = (target,) if "transcoder" in case else ()
    trainer.step(first, *targets)
    run, kernels = launched_by(monkeypatch), trainer.engine.kernels
    kernels.recording = True
    with Asks():
        trainer.advance(x, *targets)
    assert {"_decode", "_update"} <= run


def launched_by(monkeypatch) -> set[str]:
    """Names of the kernels that run from now on; what the interpreter itself does is nobody's affair."""
    run: set[str] = set()
    where, method = (GridExecutor, "__call__") if launch.interpreted() else (JITFunction, "run")
    launch_one = getattr(where, method)

    def without_asking(self, *given, **options):
        run.add(self.fn.__name__)
        with _disable_current_modes():
            return launch_one(self, *given, **options)

    monkeypatch.setattr(where, method, without_asking)
    return run


# Inference


@pytest.mark.parametrize(
    "case",
    ["topk", "relu", "relu free", "batchtopk", "jumprelu", "gated", "transcoder", "refined", "refined batchtopk"],
)
def test_inference(case, monkeypatch):
    model = make_trainer(case, "reference", torch.float32).sae
    for name, buffer in model.sparsifier.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.4)
    x = batches(D_IN, 4, 1)[0]
    with torch.no_grad():
        monkeypatch.setattr("sae.model.for_inference", lambda device, dtype: None)
        z, x_hat = model.encode(x), model(x)
        used = []

        def kernels(device, dtype):
            used.append(device)
            return Triton(device, dtype, "fp32")

        monkeypatch.setattr("sae.model.for_inference", kernels)
        ours = model.encode(x)
        torch.testing.assert_close(ours.dense(), z.dense())
        assert ours.indices is not None
        torch.testing.assert_close(model(x), x_hat)
        assert len(used) == (7 if "refined" in case else 3)
        model.encode(x[:1])
        torch.testing.assert_close(ours.dense(), z.dense())  # codes are nobody's scratch memory
        assert len(model(x[:0])) == 0
    n = len(used)
    assert model(x).requires_grad  # gradients need torch's own operations
    assert len(used) == n


def test_a_selection_of_ones_own_stays_in_inference():
    class Own(JumpReLU):
        def select(self, pre_latents):
            return SparseCodes(pre_latents.relu(), None, pre_latents.shape[1])

    own = Own(5, 1.0, 0.1)
    own.threshold.data.fill_(9.0)
    assert own.infer(None, torch.ones(2, 5)).values.sum() == 10


def test_inference_on_a_cpu_is_torchs():
    assert for_inference(CPU, torch.float32) is None


# The compiler


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the assembler says of each kernel, as often as it is compiled for other sizes."""
    program = Path(__file__).parent / "triton_compiler.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_every_kernel_compiles(compiled):
    launched = {name for path in TRITON.glob("*.py") for name in re.findall(r"^ +(_\w+)\[", path.read_text(), re.M)}
    assert launched >= {"_decode", "_update", "_maxima"}
    assert {said["kernel"] for said in compiled} == launched


def test_no_array_is_spilled_and_rows_are_read_16_bytes_at_a_time(compiled):
    # Rows that begin anywhere, a sum over scattered numbers, one histogram, nothing.
    narrow = {"_count", "_write", "_sum_by_latent", "_descend", "_one"}
    for said in compiled:
        assert said["spilled"] <= 8, said
        assert said["widest_load"] == 16 or said["kernel"] in narrow, said
        assert said["kernel"] != "_update" or said["warps"] >= 16, said


# The choice


def test_asked_for_by_name_where_they_cannot_work(monkeypatch):
    with pytest.raises(UsageError, match=r"they keep weights in torch.float32, not torch.float64; use train.kernels"):
        choose(DEVICE, torch.float64, "triton")
    with pytest.raises(UsageError, match="precision exact is a mode of the native kernels"):
        choose(DEVICE, torch.float32, "triton", "exact")
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(UsageError, match="triton cannot be used: they need a CUDA device, not cpu; use") as raised:
        choose(CPU, torch.float32, "triton")
    assert "\n" not in str(raised.value)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A device of kind cuda that nothing is put on."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "trial", lambda device: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: True)
    return torch.device("cuda:0")


def test_an_old_card_gets_torch(pretended_gpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        UsageError, match=r"they need compute capability 8.0, and cuda:0 has 7.5; use train.kernels torch"
    ):
        choose(pretended_gpu, torch.float32, "triton")
    with caplog.at_level(logging.INFO, "sae"):
        kernels = choose(pretended_gpu, torch.float32)
    assert kernels.name == "torch"
    assert "training will be slower: triton's kernels cannot be used: they need compute capability 8.0" in caplog.text


def test_a_machine_on_which_nothing_compiles_gets_torch(pretended_gpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "trial", lambda device: "Failed to find C compiler")
    with pytest.raises(
        UsageError, match=r"cannot compile or start them on cuda:0 \(Failed to find C compiler\); it needs"
    ):
        choose(pretended_gpu, torch.float32, "triton")
    assert choose(pretended_gpu, torch.float32).name == "torch"
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.skipif(not launch.interpreted(), reason="a kernel on a GPU knows no CPU")
def test_a_trial_says_what_goes_wrong_in_one_line(monkeypatch):
    def fails(*given, **options):
        raise RuntimeError("no compiler\nand much more")

    launch.trial.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert launch.trial(CPU) == ""
    launch.trial.cache_clear()
    monkeypatch.setattr(launch, "_one", {(1,): fails})
    assert launch.trial(CPU) == "no compiler"
    launch.trial.cache_clear()


def test_device_auto(pretended_gpu, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sae")
    monkeypatch.setattr(kernels_module, "require_device", lambda device, field: None)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"

    def refuse(device, field):
        raise UsageError("train.device 'cuda' cannot be used (the driver is too old); this machine has cpu; try cpu")

    monkeypatch.setattr(kernels_module, "require_device", refuse)
    assert resolve_device("auto") == "cpu"
    assert "(the driver is too old); this machine has cpu; the CPU is used" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert "there is no CUDA device that torch can use; the CPU is used" in caplog.text


def test_a_new_card_gets_triton_in_bf16(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = choose(pretended_gpu, torch.float32)
    assert (kernels.name, kernels.precision) == ("triton", "bf16")
    assert choose(pretended_gpu, torch.float32, "torch").name == "torch"
    assert choose(pretended_gpu, torch.float64).name == "torch"


def test_without_triton(pretended_gpu, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sae.kernels.triton", None)
    with pytest.raises(
        UsageError, match=r"triton cannot be imported .*; pip install triton, or use train.kernels torch"
    ):
        choose(pretended_gpu, torch.float32, "triton")
    assert choose(pretended_gpu, torch.float32).name == "torch"
    assert "triton cannot be imported" in caplog.text
