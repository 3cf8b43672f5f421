"""SAEs of other libraries: read into an `SAE`, or written so that these libraries can read ours.

model = sae.formats.load("gemma-scope/layer_20/width_16k")    # the format is recognised by the files
model = sae.formats.load("hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
sae.formats.save(model, "for-saelens", "saelens", model_name="gpt2", hook_name="blocks.8.hook_resid_pre")
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae import hub
from sae.errors import UsageError
from sae.formats import dictionary_learning, gemma_scope, openai, saelens, sparsify
from sae.formats.portable import Portable, built, portable
from sae.kernels import require_device
from sae.locks import cannot_write
from sae.model import SAE
from sae.model import load as load_own
from sae.names import CONFIG, MANIFEST, WEIGHTS
from toymodels.errors import nearest

__all__ = ["FORMATS", "WRITTEN", "load", "recognise", "save"]


class Format(NamedTuple):
    """How files of one library are named, recognised, read and, where it makes sense, written."""

    files: tuple[str, ...]
    is_here: Callable[[Path], bool]
    read: Callable[[Path], Portable]
    write: Callable[[Portable, Path, dict[str, Any]], None] | None = None


FORMATS = {
    "saelens": Format((saelens.CONFIG, saelens.WEIGHTS), saelens.is_here, saelens.read, saelens.write),
    "dictionary_learning": Format(
        (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
        dictionary_learning.is_here,
        dictionary_learning.read,
        dictionary_learning.write,
    ),
    "sparsify": Format((sparsify.CONFIG, sparsify.WEIGHTS), sparsify.is_here, sparsify.read, sparsify.write),
    "gemma_scope": Format((gemma_scope.WEIGHTS,), gemma_scope.is_here, gemma_scope.read),
    "openai": Format((), openai.is_here, openai.read),
}
OWN = (MANIFEST, WEIGHTS)
FILES = list(dict.fromkeys([*OWN, *(name for format in FORMATS.values() for name in format.files)]))
WRITTEN = [name for name, format in FORMATS.items() if format.write is not None]


def load(path: str | Path, device: str = "cpu") -> SAE:
    """The SAE of any library in a folder, a file or at an address on the Hub, ready for inference: its codes and
    reconstructions are those that the library itself would give. Our own are loaded, too.

    Raises:
        UsageError: it is of no known format, damaged, or does something that no SAE here does.
    """
    require_device(device, "device")
    here = local(path)
    if (here / MANIFEST).is_file():
        return load_own(here, device)
    try:
        return built(FORMATS[recognise(here)].read(here)).to(device)
    except UsageError as error:
        raise UsageError(str(error).replace(str(here), hub.said(path))) from error


def local(path: str | Path) -> Path:
    """The folder or file on this machine; for an address on the Hub, where it was downloaded.

    Raises:
        UsageError: the Hub does not provide it, or has no SAE there.
    """
    return hub.local(path, FILES)


def save(model: SAE, folder: str | Path, format: str, /, *, overwrite: bool = True, **metadata: Any) -> None:
    """Writes the files of another library, whose codes and reconstructions are then those of `model`, into a folder, or
    to an address on the Hub. Without `overwrite` no file is replaced; those of another format never are.

    Raises:
        UsageError: the library has no counterpart, the folder holds an SAE, or the Hub does not accept it.
    """
    if format not in WRITTEN:
        raise UsageError(f"unknown format {format!r}{nearest(format, WRITTEN)}")
    write = FORMATS[format].write
    assert write is not None
    require_place(folder, FORMATS[format].files, overwrite)
    on_cpu = model if model.W_dec.device.type == "cpu" else copy.deepcopy(model).cpu()
    try:
        with hub.written(folder, format, metadata.get("model_name", metadata.get("lm_name"))) as place:
            write(portable(on_cpu), place, metadata)
    except OSError as error:
        raise cannot_write(Path(folder), error) from error


def require_place(folder: str | Path, names: Sequence[str], overwrite: bool) -> None:
    """Refuses a folder, or an address on the Hub, that holds files of these names, or an SAE in another format, which
    would be read instead.

    Raises:
        UsageError: it does.
    """
    there = hub.existing(folder, FILES)
    foreign = [name for name in there if name not in names]
    if foreign:
        raise UsageError(f"{hub.said(folder)} holds {', '.join(foreign)} of another format; give another folder")
    if there and not overwrite:
        raise UsageError(f"{hub.said(folder)} holds {', '.join(there)}; give another --out, or --overwrite")


def recognise(path: Path) -> str:
    """The name of the files' format.

    Raises:
        UsageError: there is none.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}; give a folder or file with an SAE")
    for name, format in FORMATS.items():
        if format.is_here(path):
            return name
    if (path / CONFIG).is_file():
        raise UsageError(f"{path} is a run that is not finished; train it to the end, or save its sae.load_checkpoint")
    raise UsageError(
        f"{path} holds no SAE that is known: sae.json with sae.safetensors (a run's directory), cfg.json with "
        "sae_weights.safetensors (SAELens) or sae.safetensors (sparsify), config.json with ae.pt "
        "(dictionary_learning), params.npz (Gemma Scope), or a .pt file (OpenAI)"
    )
