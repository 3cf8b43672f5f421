"""What an SAE accepts. Shapes are checked here by the SAE itself, as users run without jaxtyping."""

import inspect

import numpy as np
import pytest
import torch

from sae import SAE, SAEConfig

encode = inspect.unwrap(SAE.encode)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((3, 4), np.float32), TypeError, r"must be a tensor, got ndarray; pass torch.from_numpy\(x\)"),
        ([[0.0] * 4] * 3, TypeError, r"must be a tensor, got list; pass torch.tensor\(x\)"),
        (torch.zeros(3, 5), ValueError, r"must be \[batch, d_in=4\], got \[3, 5\]; this SAE reads another width"),
        (torch.zeros(2, 3, 4), ValueError, r"got \[2, 3, 4\]; flatten the leading axes first"),
    ],
)
def test_what_cannot_be_encoded_is_named(x, error, message):
    model = SAE(4, SAEConfig.of_kind({"kind": "topk", "d_sae": 8, "k": 2}))
    with pytest.raises(error, match=message) as raised:
        encode(model, x)
    assert "\n" not in str(raised.value)
