"""SAEs on the Hugging Face Hub: downloads and uploads.

An address is the Hub's own, hf://OWNER/NAME[@REVISION][/FOLDER]. What is read is kept in the Hub's cache, so it is
downloaded only once.
"""

from __future__ import annotations

import difflib
import glob
import logging
import posixpath
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from sae.errors import UsageError
from sae.extras import require

logger = logging.getLogger("sae")

CARD = "README.md"
# A path that was made of an address has one slash.
SCHEME = re.compile(r"^hf:/{1,2}")
ADDRESS = re.compile(
    r"hf://(?:models/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?:/(?P<inside>.*?))?/*"
)
# What an SAE that is a file of its own is called.
FILES = (".pt", ".npz")
# Repositories of other types have their type in front, where models have their owner.
OTHERS = ("datasets", "spaces", "buckets")


class Address(NamedTuple):
    """A folder or a file in a repository of models."""

    repo: str
    revision: str | None
    inside: str
    """The path in the repository; empty: all of it."""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repo}{revision}" + (f"/{self.inside}" if self.inside else "")

    @property
    def name(self) -> str:
        """What the folder or file is called."""
        return posixpath.basename(self.inside or self.repo)

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        return posixpath.join(self.inside, name)


def address_of(path: str | Path) -> Address | None:
    """The address in these words; None where they are a path on this machine.

    Raises:
        UsageError: they begin like an address but are not one.
    """
    words = SCHEME.sub("hf://", str(path))
    if not words.startswith("hf://"):
        return None
    found = ADDRESS.fullmatch(words)
    inside = "" if found is None else re.sub("/+", "/", found["inside"] or "").strip("/")
    if found is None or found["repo"].split("/")[0] in OTHERS or {".", ".."} & set(inside.split("/")):
        raise UsageError(
            f"{words} must name a model's repository, as in hf://OWNER/NAME/FOLDER or hf://OWNER/NAME@main"
        )
    revision = found["revision"]
    return Address(found["repo"], None if revision is None else unquote(revision), inside)


def said(path: str | Path) -> str:
    """A path or an address, as it was written."""
    return str(address_of(path) or path)


def local(path: str | Path, names: Sequence[str], otherwise: str = "") -> Path:
    """A path as it is. For an address, the local folder or file after downloading the files of these names.

    `otherwise` ends the error where there are none of them.

    Raises:
        UsageError: the Hub does not provide it, or has no such files there.
    """
    address = address_of(path)
    if address is None:
        return Path(path)
    wanted = [*([address.inside] if address.inside else []), *(address.file(name) for name in names)]
    hub = _library()
    files = _listed(hub, address)
    if files is not None and not set(wanted) & set(files):
        raise UsageError(f"{address} has none of {', '.join(names)}{_elsewhere(address, files, names)}{otherwise}")
    try:
        patterns = [glob.escape(one) for one in wanted]
        root = Path(hub.snapshot_download(address.repo, revision=address.revision, allow_patterns=patterns))
    except Exception as error:  # whatever the library raises for a network, a name or a right that it has not
        raise _refused(address, "read", error) from error
    if not any((root / one).is_file() for one in wanted):
        raise UsageError(f"{address} is not in the cache, and the Hub cannot be reached; try again when it can")
    return root / address.inside


def beside(path: str | Path, words: str) -> Path:
    """A folder PATH-WORDS next to a folder or file; for an address, NAME-WORDS in the working directory."""
    address = address_of(path)
    if address is not None:
        name = Path(address.name)
        return Path(f"{name.stem if name.suffix in FILES else name}-{words}")
    path = Path(path)
    whole = path.resolve()  # "." has no name of its own
    return path.parent / f"{whole.stem if path.is_file() else whole.name}-{words}"


def existing(path: str | Path, names: Sequence[str]) -> list[str]:
    """Which files of these names exist in a folder, or at an address.

    Raises:
        UsageError: the Hub does not answer.
    """
    address = address_of(path)
    if address is None:
        return [name for name in names if (Path(path) / name).exists()]
    api = _library().HfApi()
    try:
        if not api.repo_exists(address.repo):
            return []
        places = {address.file(name): name for name in names}
        found = api.get_paths_info(address.repo, list(places), revision=address.revision)
    except Exception as error:  # as above
        raise _refused(address, "looked at", error) from error
    return [places[one.path] for one in found]


@contextmanager
def written(path: str | Path, library: str, base_model: object = None) -> Iterator[Path]:
    """The folder to write files into. For an address they are uploaded at the end, in one commit.

    A repository that does not exist is created, private. One without a README.md gets a card, which names the library
    that reads the files, and the model that they belong to.

    Raises:
        UsageError: the Hub does not accept them.
    """
    address = address_of(path)
    if address is None:
        yield Path(path)
        return
    hub = _library()
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        made = sorted(file for file in Path(folder).iterdir() if not file.name.startswith("."))
        files = {address.file(file.name): file for file in made}
        api, card = hub.HfApi(), _card(address, library, base_model)
        try:
            changes: list[Any] = [hub.CommitOperationAdd(place, file) for place, file in files.items()]
            new = not api.repo_exists(address.repo)
            if new and address.revision is not None:
                raise UsageError(
                    f"{address}: there is no such repository, and a new one has no revisions; leave it out"
                )
            if new or not api.file_exists(address.repo, CARD, revision=address.revision):
                changes.append(hub.CommitOperationAdd(CARD, card.encode()))
            if new:
                api.create_repo(address.repo, private=True)
                logger.info(
                    "created %s, which is private; make it public in its settings", Address(address.repo, None, "")
                )
            message = f"Put {', '.join(files)} here"
            api.create_commit(address.repo, changes, commit_message=message, revision=address.revision)
        except UsageError:
            raise
        except Exception as error:  # as above
            raise _refused(address, "written", error) from error


def _card(address: Address, library: str, base_model: object) -> str:
    """What the repository's page says: the Hub reads its first lines, people the rest."""
    lines = ["---", f"library_name: {library}", "tags:", "- sparse-autoencoder", "- interpretability"]
    if (
        isinstance(base_model, str)
        and re.fullmatch(r"([\w.-]+/)?[\w.-]+", base_model)
        and not Path(base_model).exists()
    ):
        lines.append(f"base_model: {base_model}")
    lines += ["---", "", f"# {address.repo.split('/')[1]}", ""]
    lines += ["Sparse autoencoders, one in each folder. To load one:", "", "```python", "import sae", ""]
    lines += [f'model = sae.formats.load("{address}")', "```", ""]
    if library == "saelens" and address.inside:
        lines += ["```python", "from sae_lens import SAE", ""]
        lines += [f'model = SAE.from_pretrained("{address.repo}", "{address.inside}")', "```", ""]
    return "\n".join(lines)


def _listed(hub: Any, address: Address) -> list[str] | None:
    """All files of the repository; None where the Hub does not answer: without a network the cache may do."""
    try:
        found = hub.HfApi().model_info(address.repo, revision=address.revision)
        return [file.rfilename for file in found.siblings]
    except Exception:  # whatever else is wrong is met again
        return None


def _elsewhere(address: Address, files: Sequence[str], names: Sequence[str]) -> str:
    """The end of an error: where in the repository there are such files, the most similar first."""
    folders = sorted({posixpath.dirname(file) for file in files if posixpath.basename(file) in names} - {""})
    if not folders:
        return ", nor has any other folder of the repository"
    close = difflib.get_close_matches(address.inside, folders, n=3, cutoff=0)
    more = f" and {len(folders) - len(close)} other folders" if len(folders) > len(close) else ""
    return f"; they are in {', '.join(close)}{more}"


def _refused(address: Address, verb: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = f"{reason[:300]}…" if len(reason) > 300 else reason.rstrip(".")
    remedy = "is there a network, is the name right, and are you logged in (`hf auth login`) where it is private?"
    return UsageError(f"{address} cannot be {verb}: {reason}; {remedy}")


def _library() -> Any:
    require("huggingface_hub", "hub", "the Hub")
    import huggingface_hub  # noqa: PLC0415 - an extra

    for name in ("huggingface_hub", "httpx", "httpx2"):  # a line for each request
        logging.getLogger(name).setLevel(logging.ERROR)
    return huggingface_hub
