"""What depends only on the truth or on chance, and not on the dictionary being judged, is computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from hashlib import blake2b
from typing import Any, TypeVar, cast

from torch import Tensor

from sae.metrics.inputs import Matrix, as_tensor

# Answers that are kept, and the bytes of their tensors together: pairs of features can be many.
MAX_KEPT, MAX_BYTES = 256, 2**28
Value = TypeVar("Value")
_kept: OrderedDict[Hashable, Any] = OrderedDict()


def once(key: Hashable, compute: Callable[[], Value]) -> Value:
    """compute(), or what it returned for this key before; the oldest answers make room.

    Dictionaries are copied, so that the caller may add to them; tensors are shared, and only read.
    """
    if key not in _kept:
        _kept[key] = compute()
        while len(_kept) > MAX_KEPT or (len(_kept) > 1 and sum(map(_bytes, _kept.values())) > MAX_BYTES):
            _kept.popitem(last=False)
    return cast("Value", _copied(_kept[key]))


def _parts(answer: Any) -> Iterable[Any]:
    return answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list | tuple) else ()


def _bytes(answer: Any) -> int:
    return answer.nbytes if isinstance(answer, Tensor) else sum(map(_bytes, _parts(answer)))


def _copied(answer: Any) -> Any:
    """Its dictionaries and lists anew."""
    if isinstance(answer, dict):
        return {name: _copied(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [_copied(value) for value in answer]
    return tuple(map(_copied, answer)) if type(answer) is tuple else answer


def fingerprint(matrix: Matrix) -> bytes:
    """Tells a matrix from any other, by its entries."""
    rows = as_tensor(matrix).cpu().contiguous().numpy()
    return blake2b(rows.data, digest_size=16, key=f"{rows.dtype} {rows.shape}".encode()).digest()
