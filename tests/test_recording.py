"""A step can be recorded once and played again, as a CUDA graph is: the same operations on the same memory, and the
host asks for nothing. Here a recorder of torch's operations plays them; the kernels believe that they are on a device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sae import SAE, TrainConfig, engine
from sae.kernels import plain
from sae.trainer import REFRESH_STEPS, Trainer

BATCH, D_IN, D_SAE = 37, 13, 70
CASES = [
    {"kind": "topk", "k": 5, "aux_k": 3},
    {"kind": "topk", "k": 5, "aux_k": 3, "multi_k": 11},
    {"kind": "batchtopk", "k": 2.3, "aux_k": 3},
    {"kind": "matryoshka", "k": 2.3, "aux_k": 3, "k_start": 6.0, "k_anneal_fraction": 0.8},
    {"kind": "refined", "k": 2.3, "aux_k": 3, "k_start": 2.3},
    {"kind": "matching_pursuit", "k": 3, "aux_k": 3, "aux_coefficient": 0.1},
    {"kind": "relu", "l1_coefficient": 0.3, "unit_norm_decoder": False},
    {"kind": "jumprelu", "l0": 20.0, "aux_k": 3},
    {"kind": "relu", "l0": 6.0},
    {"kind": "gated", "l0": 6.0},
    {"kind": "p_annealing", "l0": 6.0, "anneal_start": 0.0},
    {"kind": "skip_transcoder", "k": 5, "aux_k": 3},
]
# What makes the host wait for a device: it reads a number, or sizes follow from data.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal", "item")

LAUNCHES_NOTHING = ("empty", "empty_like", "new_empty", "set_", "squeeze_")


class Recorder(TorchDispatchMode):
    """Keeps every operation with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} makes the host wait"
        out = func(*args, **(kwargs or {}))
        if name not in LAUNCHES_NOTHING:
            self.operations.append((func, args, kwargs or {}, [alias(o) for o in tree_flatten(out)[0]]))
        return out

    @torch.no_grad()
    def play(self) -> None:
        """The same again; results go to where they went."""
        for func, args, kwargs, out in self.operations:
            for old, new in zip(out, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape, f"{func} has another shape in another step"
                    old.copy_(new)


def make_trainer(options: dict, kernels: str) -> Trainer:
    config = TrainConfig.model_validate(
        {
            "sae": {"d_sae": D_SAE} | options,
            "train": {"n_samples": 40 * BATCH, "batch_size": BATCH, "warmup_steps": 5, "kernels": kernels}
            | {"dead_after_samples": 4 * BATCH, "precision": "fp32", "lr": 3e-3},
        }
    )
    sae = SAE(D_IN, config.sae).double()
    sae.initialise_(torch.zeros(D_IN), torch.Generator().manual_seed(0))
    sae.encoder.data[-11:] *= 0.01  # these seldom win, and die
    sae.sparsifier.start_(torch.full((D_SAE,), 0.5, dtype=torch.float64), sae.b_enc.detach())
    if options["kind"] == "matching_pursuit":
        sae.W_dec.data[-11:, -1] = 1.0  # where there is little to explain
        sae.W_dec.data[-11:] /= sae.W_dec.data[-11:].norm(dim=1, keepdim=True)
    return Trainer(sae, config, 1.3)


def alias(value):
    """The same memory under the shape of now."""
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("options", CASES, ids=lambda options: options["kind"])
def test_recorded_steps_are_the_steps(options, monkeypatch):
    stream = torch.Generator().manual_seed(2)
    data = [torch.randn(BATCH, D_IN, generator=stream, dtype=torch.float64) for _ in range(40)]
    for batch in data:
        batch[:, -1] *= 0.01
    judge = make_trainer(options, "reference")
    for batch in data:
        judge.step(batch)

    for module in (plain, engine):
        monkeypatch.setattr(module, "host_sees", lambda tensor: False)
    played, x, recorder, widths = make_trainer(options, "torch"), torch.zeros_like(data[0]), Recorder(), set()
    for number, batch in enumerate(data):
        x.copy_(batch)
        if number % REFRESH_STEPS == 0:
            played.look()
            widths.add(len(played.dead))
            recorder = Recorder()
            with recorder:
                played.advance(x)
        else:
            recorder.play()
        played.n_steps_done += 1
    for (name, ours), (_, theirs) in zip(played.engine.state.weights(), judge.engine.state.weights(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(played.window, judge.window)
    assert torch.equal(played.engine.state.silent_samples, judge.engine.state.silent_samples)
    for (name, ours), (_, theirs) in zip(
        *(t.sae.sparsifier.state_dict().items() for t in (played, judge)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")
    if options["kind"] in ("topk", "batchtopk"):
        assert max(widths) > len(judge.dead) > 3, "some latents must be dead, and the list of them filled up"
