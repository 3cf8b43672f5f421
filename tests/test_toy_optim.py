"""AdamW is torch's, to the bit, and brings no compiler."""

import subprocess
import sys

import pytest
import torch

from toymodels.optim import AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_its_steps_are_those_of_torch(weight_decay):
    start = [torch.randn(3, 5), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    own, judge = AdamW(ours, weight_decay), torch.optim.AdamW(theirs, weight_decay=weight_decay, fused=True)
    for step in range(20):
        gradients, lr = [torch.randn(5, 3).T, torch.randn(7)], 0.01 / (1 + step)
        own.step(gradients, lr)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.contiguous()
        judge.param_groups[0]["lr"] = lr
        judge.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_training_a_toy_model_imports_no_compiler():
    code = (
        "import sys, torch; from toymodels.features import Features; from toymodels.models import ToyModel; "
        "from toymodels.training import train; stream = torch.Generator().manual_seed(0); "
        "train(ToyModel(4, 2, generator=stream), Features(4, 0.1), 2, generator=stream); "
        "print('torch._dynamo' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "False", ended.stderr
