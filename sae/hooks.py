"""Modules of a network by name, and the activations that go into one and come out of it: found, and replaced."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toymodels.errors import UsageError

Reads = Literal["output", "input"]


def module_named(model: nn.Module, module: nn.Module | str) -> nn.Module:
    """One of the model's modules, or the one of that name.

    Raises:
        UsageError: the model has none such.
    """
    names = dict(model.named_modules())
    found = names.get(module) if isinstance(module, str) else module
    if found is None or not any(found is one for one in names.values()):
        said = repr(module) if isinstance(module, str) else f"like the {type(module).__name__} that was given"
        close = difflib.get_close_matches(str(module), names, n=3)
        raise UsageError(
            f"the model has no module {said}; name one of its named_modules()"
            + (f", such as {', '.join(close)}" if close else "")
        )
    return found


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """What goes into a module: its first argument that is a tensor."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def output_tensor(output: Any) -> Tensor | None:
    """What comes out of a module: a tensor, or the first in a tuple or a mapping."""
    if isinstance(output, Mapping):
        return first_tensor(output.values())
    return first_tensor(output) if isinstance(output, tuple | list) else first_tensor([output])


def with_tensor(output: Any, new: Tensor) -> Any:
    """The same output with another tensor in place of the one that `output_tensor` reads."""
    if isinstance(output, Mapping):
        place = next(name for name, value in output.items() if isinstance(value, Tensor))
        changed: Any = copy.copy(output)
        changed[place] = new
        return changed
    if not isinstance(output, tuple | list):
        return new
    place = next(number for number, value in enumerate(output) if isinstance(value, Tensor))
    whole = [*output[:place], new, *output[place + 1 :]]
    if isinstance(output, list):
        return whole
    return type(output)(*whole) if hasattr(output, "_fields") else tuple(whole)


@contextmanager
def replaced(
    module: nn.Module, new: Callable[[Tensor | None, Tensor | None], Tensor], reads: Reads, writes: Reads
) -> Iterator[None]:
    """Within it `new(read, old)` replaces the module's input or output.

    `old` is what is replaced, and `read` what is read: the same, or the module's input where its output is replaced.
    Either is None where the module has no tensor there.
    """
    given: Tensor | None = None

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal given
        tensor = first_tensor((*args, *kwargs.values()))
        if writes == "output":
            given = None if tensor is None else tensor.clone()  # the module may work in place
            return None
        changed = new(tensor, tensor)
        if first_tensor(args) is None:
            return args, with_tensor(kwargs, changed)
        return with_tensor(args, changed), kwargs

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        old = output_tensor(output)
        return with_tensor(output, new(given if reads == "input" else old, old))

    hooks = []
    if reads == "input":
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
    if writes == "output":
        hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fingerprint(model: nn.Module) -> str:
    """A checksum of all weights, the same on every device: the sum of each one's bits, as whole numbers."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if not weight.is_complex() and weight.numel():
            total = weight.contiguous().view(whole[weight.element_size()]).sum(dtype=torch.int64)
            bits.update(f"{name} {tuple(weight.shape)} {int(total)}\n".encode())
    return bits.hexdigest()


def require_eval(model: nn.Module) -> None:
    """Refuses a model whose outputs may be random.

    Raises:
        UsageError: a part of it is in training mode.
    """
    if any(one.training for one in model.modules()):
        raise UsageError("the model is in training mode, in which its outputs may be random; call model.eval()")
