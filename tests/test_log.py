"""What a run says while it trains: the file always, W&B when asked for, and never at the cost of a step."""

import json
import logging
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import sae
from sae.config import TrainConfig
from sae.log import RunLog

wandb = pytest.importorskip("wandb")
# W&B's own code warns as it loads and ends; none of it is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMISED = {
    "losses/overall_loss",
    "losses/mse_loss",
    "losses/auxiliary_reconstruction_loss",
    "metrics/l0",
    "metrics/explained_variance",
    "metrics/fvu",
    "sparsity/dead_features",
    "details/current_learning_rate",
    "details/n_training_samples",
    "details/samples_per_second",
    "recovery/mcc",
    "recovery/mmcs",
    "recovery/coverage_0.9",
    "recovery/f1",
}
STEPS = list(range(8, 33, 8))


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """W&B finds no key and no settings of the machine's owner, and reaches no server."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))


def config(out: Path, mode: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 50},
            "sae": {"kind": "topk", "d_sae": 24, "k": 3},
            "train": {"n_samples": 2048, "batch_size": 64, "warmup_steps": 5},
            "evaluation": {"n_samples": 500},
            "log": {"every": 8, "wandb": mode},
            "out": out,
        }
    )


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wandb_records(out: Path) -> list:
    """Those of the one .wandb file, up to the last; W&B's own process may still be writing it."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while True:
        with suppress(DecodeError, struct.error):
            records = [Record.FromString(data) for data in log_records(path.read_bytes())]
            if records and records[-1].WhichOneof("record_type") == "exit":
                return records
        assert time.monotonic() < deadline, "the file of W&B has no end"
        time.sleep(0.05)


def read_wandb(out: Path) -> tuple[list[dict], dict]:
    """The history rows, each a mapping from key to value, and the summary."""
    history, summary = [], {}
    for record in wandb_records(out):
        match record.WhichOneof("record_type"):
            case "history":
                history.append(values_of(record.history.item))
            case "summary":
                summary |= values_of(record.summary.update)
    return history, summary


def values_of(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def log_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log: 7 bytes of header; blocks of 32 KiB of pieces (crc, length, type); full, first, middle, last."""
    block, full, last = 32768, 1, 4
    at, record = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (full, last):
            yield record
            record = b""


def test_offline_wandb_holds_every_promised_key(tmp_path):
    result = sae.train(config(tmp_path / "run", "offline"), report=False)
    history, summary = read_wandb(tmp_path / "run")
    ours = lines(tmp_path / "run")
    assert [row["_step"] for row in history] == [line["step"] for line in ours] == STEPS
    for row, line in zip(history, ours, strict=True):
        assert row.keys() >= PROMISED
        assert line.keys() >= PROMISED
    for row, line in zip(history, ours, strict=True):
        assert {key: row[key] for key in PROMISED} == pytest.approx({key: line[key] for key in PROMISED})
    assert {key: summary[key] for key in result.metrics} == pytest.approx(result.metrics, nan_ok=True)
    assert any(key.startswith("plots/feature_density") for key in history[-1])


def test_online_without_a_key_records_offline_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "sae"):
        result = sae.train(config(tmp_path / "run", "online"), report=False)
    assert "recovery/mcc" in result.metrics
    (warning,) = caplog.messages
    assert "no API key" in warning
    assert "wandb login" in warning
    assert "wandb sync" in warning
    assert read_wandb(tmp_path / "run")[0]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_wandb_that_fails_costs_no_step(tmp_path, caplog, monkeypatch, broken):
    class Run:
        id = "broken"

        def log(self, *args, **kwargs):
            raise OSError("no space left on device")

        def finish(self):
            raise AssertionError("a W&B that failed is left alone")

    def init(**options):
        if broken == "init":
            raise OSError("no space left on device")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING, "sae"):
        sae.train(config(tmp_path / "run", "offline"), report=False)
    assert [line["step"] for line in lines(tmp_path / "run")] == STEPS
    assert (tmp_path / "run/result.json").exists()
    (warning,) = caplog.messages
    assert "no space left on device" in warning


def test_disabled_means_untouched(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("W&B was started"))
    sae.train(config(tmp_path / "run", "disabled"), report=False)
    assert lines(tmp_path / "run")[0].keys() >= PROMISED
    assert not (tmp_path / "run/wandb").exists()


def test_lines_are_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path, config(tmp_path, "disabled"))
    log.line(8, {"metrics/l0": 3.0})
    assert lines(tmp_path) == [{"step": 8, "metrics/l0": 3.0}]
    log.close()


@pytest.mark.parametrize(("resume_at", "kept"), [(0, []), (8, [8]), (20, [8, 16]), (32, [8, 16, 24])])
def test_resuming_drops_later_lines_and_half_written_ones(tmp_path, resume_at, kept):
    whole = "".join(json.dumps({"step": step}) + "\n" for step in (8, 16, 24))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3')
    log = RunLog(tmp_path, config(tmp_path, "disabled"), resume_at)
    log.line(40, {})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 40]
