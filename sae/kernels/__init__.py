"""The stages of a training step, and which implementation of them a device gets. This is the one place that chooses.

`reference` is the obvious version and the judge of the others; `native` is C for CPUs, `triton` is for CUDA; `torch`
runs everywhere.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from sae.config import KernelName, PrecisionName
from sae.errors import UsageError
from sae.kernels.base import (
    WEIGHTS,
    Buffers,
    CannotRun,
    Change,
    Codes,
    Decoded,
    DenseStep,
    Kernels,
    Rows,
    Scalar,
    Scores,
    State,
    blocks,
    capacity,
    host_sees,
    sparse_share,
)
from sae.kernels.build import CannotBuild
from sae.kernels.native import Native
from sae.kernels.plain import Plain
from sae.kernels.precision import Precision, has_bf16_units, products
from sae.kernels.reference import Reference
from sae.kernels.selection import REALS

__all__ = [
    "WEIGHTS",
    "Buffers",
    "Change",
    "Codes",
    "Decoded",
    "DenseStep",
    "Kernels",
    "Rows",
    "Scalar",
    "Scores",
    "State",
    "blocks",
    "capacity",
    "choose",
    "for_inference",
    "host_sees",
    "products",
    "require_device",
    "require_kernels",
    "resolve_device",
    "sparse_share",
]

logger = logging.getLogger("sae")


def choose(
    device: torch.device, dtype: torch.dtype, name: KernelName = "auto", precision: PrecisionName = "auto"
) -> Kernels:
    """The kernels for a device, set to the precision of their products.

    Raises:
        UsageError: those asked for by name cannot work here.
    """
    kernels: Kernels
    require_kernels(device, dtype, name, precision)
    resolved = _resolve(precision, device, dtype, name)
    if name == "reference":
        kernels = Reference()
    elif name == "triton" or (name == "auto" and device.type == "cuda"):
        try:
            kernels = _triton(device, dtype, resolved)
        except CannotRun as error:
            logger.warning("training will be slower: triton's kernels cannot be used: %s; torch is used", error)
            kernels = Plain(resolved)
    elif name == "torch" or not (device.type == "cpu" and dtype in REALS):
        kernels = Plain(resolved)
    else:
        try:
            kernels = Native(dtype, resolved)
        except CannotBuild as error:
            logger.warning("training will be slower: native kernels cannot be built (%s); torch is used", error)
            kernels = Plain(resolved)
    logger.info("kernels: %s, products in %s, on %s", kernels.name, kernels.precision, device)
    return kernels


def require_kernels(device: torch.device, dtype: torch.dtype, name: KernelName, precision: PrecisionName) -> None:
    """Refuses kernels and a precision that cannot work together, or cannot work here.

    Raises:
        UsageError: they cannot.
    """
    if name == "reference" and precision not in ("auto", "fp32"):
        raise UsageError(f"the reference kernels compute in fp32, not {precision}; leave train.precision at auto")
    if precision == "exact" and (name in ("torch", "triton") or device.type != "cpu"):
        raise UsageError("precision exact is a mode of the native kernels, on a CPU; choose fp32 or bf16 here")
    if name == "triton":
        try:
            _triton(device, dtype, "fp32")
        except CannotRun as error:
            raise UsageError(f"train.kernels triton cannot be used: {error}") from error
    if name != "native" and precision != "exact":
        return
    if device.type != "cpu" or dtype not in REALS:
        raise UsageError(f"native kernels need a CPU and float32 or float64, not {device.type} and {dtype}; use auto")
    try:
        Native(dtype, "fp32")
    except CannotBuild as error:
        what = "precision exact" if precision == "exact" else "train.kernels native"
        raise UsageError(
            f"{what} needs native kernels, which cannot be built: {error}; install a C compiler"
        ) from error


def resolve_device(device: str) -> str:
    """`auto` is CUDA where torch can use it, else the CPU; anything else is meant as it is."""
    if device != "auto":
        return device
    if not torch.cuda.is_available():
        logger.info("train.device auto: there is no CUDA device that torch can use; the CPU is used")
        return "cpu"
    try:
        require_device("cuda", "train.device")
    except UsageError as error:
        logger.warning("train.device auto: %s; the CPU is used", str(error).removesuffix("; try cpu"))
        return "cpu"
    logger.info("train.device auto: cuda is used")
    return "cuda"


def require_device(device: str, field: str) -> None:
    """Refuses a device that torch cannot use; `field` is where it was asked for.

    Raises:
        UsageError: there is none of this name.
    """
    if device == "auto":
        return
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        kind = torch.accelerator.current_accelerator(check_available=True)
        here = ["cpu", *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]
        # Of a kind that is there torch says what is wrong; of any other, how torch itself was built.
        known = kind is not None and device.partition(":")[0] == kind.type
        reason = f" ({(str(error).splitlines() or [''])[0]})" if known else ""
        raise UsageError(
            f"{field} {device!r} cannot be used{reason}; this machine has {', '.join(here)}; try cpu"
        ) from error


def _resolve(precision: PrecisionName, device: torch.device, dtype: torch.dtype, name: KernelName) -> Precision:
    if precision == "auto":
        worth_it = dtype == torch.float32 and name != "reference" and has_bf16_units(device)
        return "bf16" if worth_it else "fp32"
    if precision != "fp32" and not has_bf16_units(device):
        logger.warning("%s has no bf16 units: %s products are emulated, and slower than fp32", device, precision)
    return precision


@cache
def for_inference(device: torch.device, dtype: torch.dtype) -> Any:
    """Triton's kernels where they can encode and decode; None elsewhere."""
    if device.type != "cuda":
        return None
    try:
        return _triton(device, dtype, "fp32")
    except CannotRun as error:
        logger.info("inference on %s goes by torch: triton's kernels cannot be used: %s", device, error)
        return None


def _triton(device: torch.device, dtype: torch.dtype, precision: Precision) -> Kernels:
    """Imported when they are asked for: triton is not everywhere, and takes long to import.

    Raises:
        CannotRun: they cannot work here, or triton is not installed.
    """
    try:
        from sae.kernels.triton import Triton  # noqa: PLC0415
    except ImportError as error:
        raise CannotRun(
            f"triton cannot be imported ({error}); pip install triton, or use train.kernels torch"
        ) from error
    return Triton(device, dtype, precision)
