"""`sae convert`: from the files of one library to those of another."""

from __future__ import annotations

import glob
import logging
from pathlib import Path
from typing import Any

import yaml

from sae import formats, hub
from sae.errors import UsageError
from sae.formats.network import network_metadata
from sae.locks import held
from sae.names import CHECKPOINTS, CONFIG
from toymodels.plain_yaml import parse_yaml

logger = logging.getLogger("sae")

OWN = "sae"


def convert(path: Path, to: str, out: Path | None, metadata: str, overwrite: bool) -> str:
    """Reads, writes, and returns a line that says what was done.

    Raises:
        UsageError: it cannot be read or written, or would replace files.
    """
    words = _mapping(metadata)
    model = formats.load(path)
    out = hub.beside(path, to) if out is None else out
    if out.is_file():
        raise UsageError(f"{out} is a file; give a folder as --out")
    # A file that is there already is somebody's.
    formats.require_place(out, formats.OWN if to == OWN else formats.FORMATS[to].files, overwrite)
    if to == OWN:
        if words:
            raise UsageError(f"our own format has no metadata, got {', '.join(words)}; leave it out")
        begun = [name for name in (CONFIG, CHECKPOINTS) if (out / name).exists()]
        if begun:
            raise UsageError(
                f"{out} holds a run ({', '.join(begun)}), which would end as another SAE; give another --out"
            )
        with hub.written(out, OWN) as folder, held(folder):
            model.save(folder)
    else:
        formats.save(model, out, to, **(_known_there(network_metadata(path, to), out) | words))
    return f"wrote {hub.said(out)}/: {model.config.kind}, d_in={model.d_in}, d_sae={model.d_sae}, from {hub.said(path)}"


def _known_there(metadata: dict[str, Any], out: Path) -> dict[str, Any]:
    """What a run knows about its network; on the Hub without local paths, which nobody there can follow."""
    if hub.address_of(out) is None:
        return metadata
    local = [name for name, value in metadata.items() if isinstance(value, str) and glob.glob(value)]
    for name in local:
        logger.info("left out %s, a local path; give a name with --metadata '{%s: ...}'", name, name)
    return {name: value for name, value in metadata.items() if name not in local}


def _mapping(text: str) -> dict[str, object]:
    try:
        mapping = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--metadata {text}: {' '.join(str(error).split())}; give {{name: value}}") from error
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
        raise UsageError(f"--metadata must be a mapping, as in {{model_name: gpt2}}, got {text!r}")
    return mapping
