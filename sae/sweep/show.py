"""What the command line shows of a sweep: one progress bar for all members, and their table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sae.console import one_bar, postfix, print_table
from sae.scores import CE, DEAD, FVU, L0, MCC, scores
from sae.sweep.group import Ended, Logged
from sae.sweep.plan import Plan
from sae.sweep.run import Outcome

COLUMNS = scores(L0, FVU, CE, MCC, DEAD)


@contextmanager
def progress(plan: Plan) -> Iterator[Callable[[Logged | Ended], None]]:
    """A bar over the steps of all members; the function that it yields takes the events of `run_sweep`."""
    n_steps = {member.name: member.config.n_steps for member in plan.members}
    done: dict[str, int] = {}
    n_ended = 0
    with one_bar(f"0 of {len(n_steps)} members", sum(n_steps.values())) as bar:

        def on_event(message: Logged | Ended) -> None:
            nonlocal n_ended
            if isinstance(message, Ended):
                n_ended += message.status != "interrupted"
                bar.set_description(f"{n_ended} of {len(n_steps)} members", refresh=False)
                now = done.get(message.name, 0) if message.status == "interrupted" else n_steps[message.name]
            else:
                bar.set_postfix_str(f"{message.name}  {postfix(message.values)}", refresh=False)
                now = message.step
            bar.update(now - done.get(message.name, 0))
            done[message.name] = now

        yield on_event


def print_outcome(outcome: Outcome) -> None:
    """The table of members; one that is not done shows the last values that it logged."""
    shown = [score for score in COLUMNS if any(score.key in row["metrics"] for row in outcome.rows)]
    rows = []
    for row in outcome.rows:
        metrics = row["metrics"]
        values = [f"{metrics[score.key]:{score.form}}" if score.key in metrics else "" for score in shown]
        rows.append([row["name"], *values, row["status"]])
    partial = " Those that are not done stand as their last logged line says." if outcome.not_done else ""
    print_table(
        "members",
        ["", *(score.name for score in shown), "status"],
        rows,
        f"Done: measured on held-out activations.{partial}",
    )


def last_line(outcome: Outcome) -> str:
    """What is missing, for a sweep whose members are not all done."""
    left = outcome.not_done
    named = ", ".join(f"{row['name']} ({row['status']})" for row in left[:5]) + (", ..." if len(left) > 5 else "")
    remedy = "; continue with --resume" if outcome.signal_number else ""
    return f"{len(left)} of {len(outcome.rows)} members are not done: {named}{remedy}"
