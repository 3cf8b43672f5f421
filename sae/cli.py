"""The command line: from words to a command. A user's error is one line and exit code 2."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.conf import OmitArgPrefixes, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sae.commands import COMMANDS, Command, SetsFields
from sae.commands.training import Train
from sae.errors import Interrupted, OtherProcess, UsageError
from sae.launch import n_started, speaks
from toymodels.errors import nearest
from toymodels.one_line import require_command, understood

ANNOTATED = [Annotated[command, subcommand(name, prefix_name=False)] for name, command in COMMANDS.items()]
ANY_COMMAND: Any = reduce(or_, ANNOTATED)
REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """A Literal whose error names the nearest choice, too."""
    if get_origin(info.type) is not Literal:
        return None
    choices = get_args(info.type)

    def read(words: list[str]) -> str:
        if words[0] not in choices:
            raise ValueError(f"unknown {words[0]!r}{nearest(words[0], choices)}")
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=read,
        is_instance=choices.__contains__,
        str_from_instance=lambda choice: [choice],
    )


def parse(words: Sequence[str]) -> Command:
    """The command that the words stand for.

    Raises:
        UsageError: they are not a valid command.
        SystemExit: they ask for help, which is printed.
    """
    require_command("sae", words, COMMANDS)
    asked: type = COMMANDS.get(words[0], object)
    overrides, rest = _split_overrides(asked, words) if issubclass(asked, SetsFields) else ([], list(words))
    if any(not word or (word.startswith("--") and word.partition("=")[1:] == ("=", "")) for word in rest):
        raise UsageError(f"a word of `sae {shlex.join(words)}` is empty; is a shell variable unset?")

    def read() -> tuple[Command, list[str]]:
        found: tuple[Any, list[str]] = tyro.cli(
            OmitArgPrefixes[ANY_COMMAND],  # type: ignore[misc]
            prog="sae",
            description="Train sparse autoencoders on any activations, and know whether they found the truth.",
            args=rest,
            return_unknown_args=True,
            registry=REGISTRY,
        )
        return found

    command, unknown = understood(read, "sae", words, COMMANDS)
    if unknown:
        raise UsageError(f"unknown argument {unknown[0]!r}; see `sae {type(command).__name__.lower()} --help`")
    if isinstance(command, SetsFields):
        command.overrides = tuple(overrides)
    return command


def _split_overrides(command: type[SetsFields], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags that set a field (--sae.k) or a section (--sae) of the file, with their values; and all other words. Such a
    flag may come before the file.

    Raises:
        UsageError: a flag is neither one of these nor the command's.
    """
    own, sections = command.flags(), [f"--{name}" for name in command.sections()]
    overrides, rest, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name in own:
            rest.append(word)
        elif name.partition(".")[0] in sections or ("." in name and command.reads_all):
            overrides.append(word)
            if not equals and queue and not queue[0].startswith("--"):
                overrides.append(queue.pop(0))
        else:
            like = nearest(name, [*own, *sections])
            raise UsageError(f"unknown flag {name!r}{like}; a field is set as in {command.example}")
    return overrides, rest


# What can befall any file that a command reads or writes.
DENIED = "give a file or directory that you may read and write"
FULL = "make room on that disk; what has begun, as `sae train` or `sae harvest`, goes on with --resume"
REMEDIES = {errno.EACCES: DENIED, errno.EPERM: DENIED, errno.EROFS: DENIED, errno.ENOSPC: FULL, errno.EDQUOT: FULL}


def _require_one_process(command: Command) -> None:
    """Refuses to run in several processes what they cannot share."""
    if n_started() == 1 or isinstance(command, Train):
        return
    name = type(command).__name__.lower()
    rule = f"`sae {name}` is not shared by processes, and {n_started()} were started; start it without torchrun"
    raise UsageError(rule) if speaks() else OtherProcess(rule)


def _who() -> str:
    """The process that speaks, where there are several."""
    return "sae" if speaks() else f"sae, process {os.environ['RANK']}"


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="sae: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        command = parse(sys.argv[1:])
        _require_one_process(command)
        command.run()
    except OtherProcess:
        sys.exit(2)
    except UsageError as error:
        print(f"{_who()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"{_who()}: error: {what}; {REMEDIES[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no class of its own for this.
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        print(
            f"{_who()}: error: not enough memory; lower train.batch_size or sae.d_sae",
            file=sys.stderr,
        )
        sys.exit(2)
    except Interrupted as stopped:
        if speaks():
            print(f"sae: {stopped.message}", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        print("sae: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
