"""Commands for the activations of networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from sae.commands.base import SetsFields
from sae.errors import UsageError


@dataclass
class Harvest(SetsFields):
    """Write the activations of a language model into a store, once, to train on any number of times.

    CONFIG.yaml has a section `source` of kind `model`; it may be the file of a training run. Any value of the section
    can be set on the command line: `--source.n_tokens 1_000_000`, `--source.device cuda`.
    """

    config: Positional[Path]
    out: Path
    """The folder to write."""
    modules: tuple[str, ...] = ()
    """Several modules in one pass of the model, each into a separate folder under OUT; default the file's module."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype in which activations are kept; default the model's."""
    resume: bool = False
    """Continue a harvest that was stopped."""
    overwrite: bool = False
    """Discard the store that the folder holds."""
    example: ClassVar[str] = "--source.n_tokens 1_000_000"
    reads_all: ClassVar[bool] = False

    @classmethod
    def sections(cls) -> list[str]:
        return ["source"]

    def run(self) -> None:
        from sae.console import one_bar  # noqa: PLC0415
        from sae.networks.harvest import harvest_model  # noqa: PLC0415
        from sae.networks.plan import load_plan  # noqa: PLC0415
        from sae.stores.show import summary  # noqa: PLC0415

        plan = load_plan(self.config, self.overrides)
        with one_bar("reading", 0, "context") as bar:

            def on_begin(n: int) -> Callable[[int], object]:
                bar.reset(n)
                return bar.update

            paths = harvest_model(
                plan,
                self.out,
                self.modules,
                self.dtype,
                resume=self.resume,
                overwrite=self.overwrite,
                on_begin=on_begin,
            )
        for path in paths:
            print(summary(path))


@dataclass
class Store:
    """Inspect or check an activation store, or write one from other files.

    `info` says what a store holds, `verify` checks every shard against its checksum, and `convert` writes a store from
    arrays (.npy, .npz, .safetensors; [rows, d] or [inputs, positions, d]), from activations cached by SAELens, or from
    another store in a different dtype.
    """

    action: Annotated[Positional[Literal["info", "verify", "convert"]], arg(metavar="{info,verify,convert}")]
    path: Positional[Path]
    out: Path | None = None
    """For convert: the folder to write; default PATH-store."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """For convert: dtype in which activations are kept; default the one they have."""
    key: str | None = None
    """For convert: the array or column, where there are several."""
    overwrite: bool = False
    """For convert: discard the store that the folder holds."""

    def run(self) -> None:
        from sae.stores.convert import write_store  # noqa: PLC0415
        from sae.stores.show import print_info, summary, verify  # noqa: PLC0415

        if self.action == "convert":
            if self.out is None and not self.path.exists():
                raise UsageError(f"{self.path} is not a single file or folder; name the store to write with --out")
            whole = self.path.resolve()  # "." has no name of its own
            name = whole.stem if whole.is_file() else whole.name
            out = self.out or self.path.parent / f"{name}-store"
            write_store(self.path, out, self.dtype, self.key, self.overwrite)
            print(summary(out))
            return
        given = {"--out": self.out, "--dtype": self.dtype, "--key": self.key, "--overwrite": self.overwrite or None}
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"{name} is for `sae store convert`; `sae store {self.action}` writes nothing")
        (print_info if self.action == "info" else verify)(self.path)
