"""The stages of a training step in Triton, for CUDA devices. Importing it needs triton, and takes time."""

from sae.kernels.triton.kernels import Triton

__all__ = ["Triton"]
