"""What a run reports while it trains: `metrics.jsonl` always, Weights & Biases on request.

The file comes first and is flushed line by line. W&B may fail (no network, no key, a full disk) at any point
without costing a step: the failure is reported once, and the run continues without it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sae.config import TrainConfig
from sae.extras import require
from sae.names import LINES

logger = logging.getLogger("sae")
INIT_TIMEOUT_SECONDS = 30.0


class RunLog:
    """The log of one run. On resuming at a step, later lines of the interrupted run are dropped."""

    def __init__(self, out: Path, config: TrainConfig, resume_at: int = 0) -> None:
        kept = []
        if resume_at and (out / LINES).exists():
            lines = (out / LINES).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resume_at]
        (out / LINES).write_text("".join(kept), encoding="utf-8")
        self.file = (out / LINES).open("a", encoding="utf-8")
        self.wandb = WandbLog(out, config) if config.log.wandb != "disabled" else None

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """One logged step."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.line(step, values)

    def finish(
        self, step: int, final: Mapping[str, float], density: Float[Tensor, " d_sae"], report: Path | None
    ) -> None:
        """The final metrics, the latents' firing frequencies, and the report if there is one."""
        if self.wandb is not None:
            self.wandb.finish(step, final, density, report)
        self.close()

    def close(self) -> None:
        """Ends the log as it stands."""
        self.file.close()
        if self.wandb is not None:
            self.wandb.close()


class WandbLog:
    """A W&B run that can fail but not raise."""

    def __init__(self, out: Path, config: TrainConfig) -> None:
        self.run: Any = None
        mode = config.log.wandb
        wandb = _attempt(lambda: importlib.import_module("wandb"))
        if wandb is None:
            return
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _attempt(lambda: wandb.api.api_key)):
            logger.warning(
                "W&B: no API key (run `wandb login` or set WANDB_API_KEY); recording offline under %s/wandb, "
                "upload it later with `wandb sync`",
                out,
            )
            mode = "offline"
        self.run = _attempt(
            lambda: wandb.init(
                mode=mode,
                dir=str(out),
                project=config.log.project,
                name=config.log.name or out.name,
                group=config.log.group,
                config=config.model_dump(mode="json"),
                reinit="create_new",  # a sweep has several at once
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS, silent=True, console="off"),
            )
        )

    def line(self, step: int, values: Mapping[str, float]) -> None:
        self._do(lambda run: run.log(dict(values), step=step))

    def finish(
        self, step: int, final: Mapping[str, float], density: Float[Tensor, " d_sae"], report: Path | None
    ) -> None:
        import wandb  # noqa: PLC0415

        log_density = density.clamp_min(1e-10).log10().tolist()
        rows: list[Iterable[Any]] = [[name, float(value)] for name, value in final.items()]

        def record(run: Any) -> None:
            run.log(
                {
                    "plots/feature_density": wandb.Histogram(log_density),
                    "final": wandb.Table(columns=["metric", "value"], data=rows),
                },
                step=step,
                commit=True,  # else the row is written at the end, and its values win over the summary's
            )
            run.summary.update(dict(final))
            if report is not None:
                artifact = wandb.Artifact(f"report-{run.id}", type="report")
                artifact.add_file(str(report))
                run.log_artifact(artifact)

        self._do(record)

    def close(self) -> None:
        self._do(lambda run: run.finish())
        self.run = None

    def _do(self, action: Callable[[Any], Any]) -> None:
        if self.run is not None and _attempt(lambda: (action(self.run), True)) is None:
            self.run = None


def require_wandb(config: TrainConfig) -> None:
    """Refuses a run that uses W&B where it is not installed: better to report it before training than after."""
    if config.log.wandb != "disabled":
        require("wandb", "wandb", f"log.wandb {config.log.wandb}", "set log.wandb to disabled")


def _attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # whatever W&B raises must not end the run
        logger.warning(
            "W&B failed (%s); the run continues, its record is %s", " ".join(str(error).split())[:200], LINES
        )
        return None
