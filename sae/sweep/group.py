"""Trains the members of one stream together, in this process, and reports how each ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sae.ensemble import Diverged, Ensemble, Run
from sae.errors import Interrupted, UsageError
from sae.names import STATUS
from sae.networks.source import read_together
from sae.run import as_it_begins, conclude, open_run
from sae.sources import SharedSource, Source
from sae.stopping import Stop
from sae.sweep.plan import Member, SweepSection
from sae.sweep.rules import Line, Stopped, read_lines, verdict
from toymodels.files import write_text

logger = logging.getLogger("sae")

Status = Literal["done", "stopped", "diverged", "failed", "interrupted"]


@dataclass(frozen=True)
class Logged:
    """A member wrote a line of its log."""

    name: str
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Ended:
    """A member ended; `reason` is empty when it is done."""

    name: str
    status: Status
    reason: str = ""


Tell = Callable[[Logged | Ended], None]


@dataclass(frozen=True)
class Group:
    """Members on one stream, to be trained by one process at once."""

    members: tuple[Member, ...]
    section: SweepSection
    resume: bool

    def run(self, open_source: OpenSource, tell: Tell, stop: Stop) -> None:
        """Trains all members; reports each one's lines, and its end exactly once."""
        left = {member.name: member for member in self.members}
        runs: list[Run] = []

        def end(name: str, status: Status, reason: str = "") -> None:
            del left[name]
            tell(Ended(name, status, reason))

        try:
            sources: dict[str, Source] = {}
            for member in self.members:
                try:
                    sources[member.name] = open_source(member)
                except UsageError as wrong:
                    end(member.name, "failed", str(wrong))
            if not sources:
                return
            feed, own = shared(list(sources.values()))
            for member, source in zip([m for m in self.members if m.name in sources], own, strict=True):
                runs += self._open(member, source, tell, end)
            for run, error in Ensemble(runs, feed).feed(stop):
                end(run.config.out.name, *self._close(run, error))
        except Interrupted:
            for name in list(left):
                end(name, "interrupted")
        except Exception as error:
            reason = _explain(error)
            for name in list(left):
                end(name, "failed", reason)
        finally:
            for run in runs:
                run.close()

    def _open(self, member: Member, source: Source, tell: Tell, end: Callable[..., None]) -> list[Run]:
        """The member's run, in a list of one; of none when it cannot begin."""
        (member.config.out / STATUS).unlink(missing_ok=True)
        lines: list[Line] = []

        def on_line(step: int, values: Mapping[str, float]) -> None:
            tell(Logged(member.name, step, dict(values)))
            lines.append({"step": step, **values})
            reason = verdict(lines, member.config, self.section)
            if reason is not None:
                raise Stopped(reason)

        try:
            begun = as_it_begins(member.config, self.resume)
            with told_of(member.name):
                run = open_run(member.config, begun, source, self.resume, on_line)
        except Exception as error:
            end(member.name, "failed", _explain(error))
            return []
        try:
            lines += read_lines(member.config.out)
        except BaseException:
            run.close()
            raise
        return [run]

    def _close(self, run: Run, error: Exception | None) -> tuple[Status, str]:
        """Measures and saves a run that took its last step; records why any other ended."""
        try:
            if error is not None:
                raise error
            with told_of(run.config.out.name):
                conclude(run, report=False)
        except (Stopped, Diverged) as reason:
            status: Status = "diverged" if isinstance(reason, Diverged) else "stopped"
            words = {"status": status, "reason": str(reason), "step": run.n_steps_done}
            write_text(run.config.out / STATUS, json.dumps(words, indent=2) + "\n")
            return status, str(reason)
        except Exception as reason:
            return "failed", _explain(reason)
        finally:
            run.close()
        return "done", ""


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Prefixes what is logged meanwhile with the member's name."""

    def add(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"{name}: {record.getMessage()}", ()
        return True

    logger.addFilter(add)
    try:
        yield
    finally:
        logger.removeFilter(add)


def shared(sources: Sequence[Source]) -> tuple[Source, list[SharedSource]]:
    """One source that feeds all of these, which are on one stream, and each one's part of it."""
    distinct = list(dict.fromkeys(sources))
    if len(distinct) == 1:
        one = SharedSource(distinct[0])
        return one, [one] * len(sources)
    whole, owns = read_together(distinct)
    parts = {source: SharedSource(source, own) for source, own in zip(distinct, owns, strict=True)}
    return whole, [parts[source] for source in sources]


OpenSource = Callable[[Member], Source]


def opener() -> OpenSource:
    """Opens each source once: a toy model is trained, and a language model loaded, once for all that use it."""
    kept: dict[str, Source] = {}

    def open_source(member: Member) -> Source:
        config = member.config.source
        assert config is not None
        key = config.model_dump_json()
        if key not in kept:
            kept[key] = config.open_beside(list(kept.values()))
        return kept[key]

    return open_source


def _explain(error: Exception) -> str:
    """A user's mistake in its own words; anything else with its kind, and its traceback in the log."""
    if isinstance(error, UsageError):
        return str(error)
    logger.error("unexpected end of a member", exc_info=error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
