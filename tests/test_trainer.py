import gc
import json
import pickle
import weakref

import numpy as np
import pytest
import torch

import sae
from sae import UsageError, checkpoint, run
from sae.config import TrainConfig
from sae.errors import Interrupted
from sae.held_out import HeldOut
from sae.schedules import Clock, learning_rate, warmup
from sae.sources import as_source
from sae.start import start

CPU = torch.device("cpu")

KINDS = [
    {"kind": "topk", "k": 3},
    {"kind": "topk", "k": 3, "multi_k": 12, "k_start": 9.0, "k_anneal_fraction": 0.8},
    {"kind": "batchtopk", "k": 2.5},
    {"kind": "relu", "l1_coefficient": 0.1},
    {"kind": "relu", "l0": 2.5},
    {"kind": "gated", "l1_coefficient": 0.1},
    {"kind": "gated", "l0": 2.5},
    {"kind": "p_annealing", "l0": 2.5, "anneal_start": 0.0},
    {"kind": "jumprelu", "l0": 2.5},
    {"kind": "jumprelu", "penalty": "tanh", "l0_coefficient": 0.003},
    {"kind": "matryoshka", "k": 2.5, "k_start": 9.0, "k_anneal_fraction": 0.8},
    {"kind": "refined", "k": 2.5},
    {"kind": "transcoder", "k": 3},
    {"kind": "skip_transcoder", "base": {"kind": "batchtopk", "k": 2.5}},
    {"kind": "matching_pursuit", "k": 3, "aux_coefficient": 0.1},
]


def config(out, n_samples=1280, **sections) -> TrainConfig:
    options = {"d_sae": 24} | sections.pop("sae", {"kind": "topk", "k": 3})
    return TrainConfig.model_validate(
        {
            "source": {"kind": "toy", "n_features": 16, "d_hidden": 6, "feature_prob": 0.1, "n_steps": 100},
            "sae": options,
            "train": {"n_samples": n_samples, "batch_size": 64, "warmup_steps": 5} | sections.pop("train", {}),
            "evaluation": {"n_samples": 500},
            "log": {"every": 5},
            "out": out,
            **sections,
        }
    )


@pytest.mark.parametrize("options", KINDS)
def test_a_run_learns_and_leaves_what_it_promises(tmp_path, options):
    result = sae.train(config(tmp_path / "run", n_samples=19_200, sae=options), report=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["metrics/fvu"] < 0.5 * lines[0]["metrics/fvu"]
    assert lines[-1]["step"] == 300
    assert {"losses/overall_loss", "losses/mse_loss", "losses/auxiliary_reconstruction_loss"} < lines[0].keys()
    assert {"recovery/mcc", "recovery/mmcs", "recovery/coverage_0.9", "recovery/f1"} < lines[0].keys()
    assert result.metrics == json.loads((tmp_path / "run/result.json").read_text())
    x = torch.randn(50, 6)
    loaded = sae.load(tmp_path / "run")
    ours, theirs = result.sae.encode(x), loaded.encode(x)
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(result.sae(x), loaded(x))
    if loaded.config.unit_norm_decoder:
        torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("options", KINDS)
def test_resuming_continues_bit_for_bit(tmp_path, options, monkeypatch):
    train = {"dead_after_samples": 128}
    whole = config(tmp_path / "whole", sae=options, train=train)
    expected = sae.train(whole, report=False)

    parts = config(tmp_path / "parts", sae=options, train=train, checkpoint={"every_steps": 7, "keep": 1})
    original = run.Trainer.step

    def step_until_13(self, x):
        if self.n_steps_done == 13:
            raise KeyboardInterrupt
        original(self, x)

    monkeypatch.setattr(run.Trainer, "step", step_until_13)
    with pytest.raises(KeyboardInterrupt):
        sae.train(parts, report=False)
    monkeypatch.setattr(run.Trainer, "step", original)
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step-000000007"]
    resumed = sae.train(parts, resume=True, report=False)

    for name, tensor in expected.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    assert resumed.metrics == expected.metrics
    without_clock = [
        [{k: v for k, v in json.loads(line).items() if "per_second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "parts/metrics.jsonl")
    ]
    assert without_clock[0] == without_clock[1]


def test_an_evaluation_that_is_interrupted_costs_no_step(tmp_path, monkeypatch):
    expected = sae.train(config(tmp_path / "whole"), report=False)
    parts = config(tmp_path / "parts", checkpoint={"every_steps": 7})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    original = run.evaluate_on
    monkeypatch.setattr(run, "evaluate_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sae.train(parts, report=False)
    monkeypatch.setattr(run, "evaluate_on", original)

    def no_step(*_: object) -> None:
        raise AssertionError("all steps were done")

    monkeypatch.setattr(run.Trainer, "step", no_step)
    assert sae.train(parts, resume=True, report=False).metrics == expected.metrics


def test_resuming_something_else_is_refused(tmp_path):
    sae.train(config(tmp_path / "run"), report=False)
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume"):
        sae.train(config(tmp_path / "run"), report=False)
    with pytest.raises(UsageError, match=r"cannot be resumed: train\.lr was null, now 0\.1; use the same value"):
        sae.train(config(tmp_path / "run", train={"lr": 0.1}), resume=True, report=False)
    before = (tmp_path / "run/sae.safetensors").read_bytes()
    done = sae.train(config(tmp_path / "run"), resume=True, report=False)
    assert done.metrics["metrics/fvu"] > 0
    assert (tmp_path / "run/sae.safetensors").read_bytes() == before


def test_overwriting_takes_the_run_and_nothing_else(tmp_path):
    sae.train(config(tmp_path / "run"), report=False)
    (tmp_path / "run/notes.txt").write_text("mine")
    sae.train(config(tmp_path / "run", train={"seed": 1}), overwrite=True, report=False)
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_a_run_half_deleted_can_be_overwritten(tmp_path, monkeypatch):
    sae.train(config(tmp_path / "run"), report=False)
    (tmp_path / "run/checkpoints").mkdir(exist_ok=True)

    def cut_short(path: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sae.run.shutil.rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            sae.train(config(tmp_path / "run"), overwrite=True, report=False)
    assert sae.train(config(tmp_path / "run"), overwrite=True, report=False).metrics["metrics/fvu"] > 0


def test_a_directory_with_files_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "project/checkpoints").mkdir(parents=True)
    (tmp_path / "project/checkpoints/model.pt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds checkpoints, which no run wrote"):
            sae.train(config(tmp_path / "project"), overwrite=overwrite, report=False)
    assert (tmp_path / "project/checkpoints/model.pt").read_text() == "precious"


def test_bad_data_do_not_cost_the_earlier_run(tmp_path):
    sae.train(config(tmp_path / "run"), report=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    for bad in (torch.ones(100, 6), torch.zeros(10, 6)):
        with pytest.raises(UsageError):
            sae.train(config(tmp_path / "run"), bad, overwrite=True, report=False)
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_activations_passed_from_python_are_what_is_recorded(tmp_path):
    sae.train(config(tmp_path / "run"), torch.randn(500, 6), report=False)
    assert sae.load_config(tmp_path / "run/config.yaml").source is None
    with pytest.raises(UsageError, match="passed from Python"):
        sae.evaluate_run(tmp_path / "run")


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="loss is not finite"):
        sae.train(config(tmp_path / "run", train={"lr": 1e30}, sae={"kind": "relu"}), report=False)
    assert checkpoint.latest(tmp_path / "run/checkpoints") is None


def test_a_damaged_checkpoint_is_refused(tmp_path):
    tensors = {"a": torch.arange(10.0)}
    checkpoint.save(tmp_path, 3, tensors, {"n": 1}, keep=2)
    path = checkpoint.latest(tmp_path)
    assert torch.equal(checkpoint.load(path)[0]["a"], tensors["a"])
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="does not match its checksum"):
        checkpoint.load(path)


def test_bad_data_in_mid_run_saves_what_was_learnt(tmp_path):
    def batches():
        for number in range(1000):
            x = torch.randn(256, 6)
            x[3, 1] = torch.nan if number == 60 else 0.0
            yield x

    with pytest.raises(UsageError, match="batch 60 row 3 holds NaN"):
        sae.train(config(tmp_path / "run", n_samples=64_000), batches(), report=False)
    assert checkpoint.latest(tmp_path / "run/checkpoints").name == "step-000000112"


def test_training_does_not_depend_on_the_scale_of_the_data(tmp_path):
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)).abs().pow(2)
    small, large = (
        sae.train(config(tmp_path / name, sae={"kind": "relu"}), x * scale, report=False)
        for name, scale in (("small", 1.0), ("large", 1024.0))
    )
    torch.testing.assert_close(large.sae.W_dec, small.sae.W_dec)
    torch.testing.assert_close(large.sae.b_enc, 1024 * small.sae.b_enc)
    assert large.metrics["metrics/fvu"] == pytest.approx(small.metrics["metrics/fvu"], rel=1e-4)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "matching_pursuit"])
def test_training_in_float64(tmp_path, kind, monkeypatch):
    """Where that is the process's own type, whatever the activations are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)).abs()
        own = {"l0": 2} if kind == "jumprelu" else {"k": 2}
        options = {"kind": kind, "d_sae": 12} | own
        runs = [
            sae.train(config(tmp_path / f"{number}", sae=options), part, report=False)
            for number, part in enumerate((x, x.float()))
        ]
    finally:
        torch.set_default_dtype(before)
    assert all(run.sae.W_dec.dtype == torch.float64 for run in runs)
    assert runs[0].metrics["metrics/fvu"] == pytest.approx(runs[1].metrics["metrics/fvu"], rel=1e-3)


def test_constant_data_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no variance"):
        sae.train(config(tmp_path / "run"), torch.ones(100, 6), report=False)


def test_dead_latents_are_found_and_revived(tmp_path):
    # From an untied start many latents never win; AuxK gives them what the winners leave over.
    stream = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(48, 16, generator=stream), dim=1)
    x = (torch.rand(40_000, 48, generator=stream) * (torch.rand(40_000, 48, generator=stream) < 0.04)) @ truth
    dead = {}
    for weight in (0.0, 1.0):
        options = {"kind": "topk", "d_sae": 48, "k": 2, "tied_init": False, "aux_coefficient": weight}
        train = {"dead_after_samples": 2560, "batch_size": 256}
        made = config(tmp_path / f"{weight}", n_samples=307_200, sae=options, train=train)
        dead[weight] = sae.train(made, x, report=False).metrics["metrics/dead"]
    assert dead[0.0] > 0.1
    assert dead[1.0] < 0.4 * dead[0.0]


def test_moments_are_given_up_before_the_evaluation(tmp_path, monkeypatch):
    """They take twice the memory of the weights: nothing may hold the trainer in a circle."""
    trainers, alive = [], []
    begin = run.start

    def start(*given):
        trainer = begin(*given)
        trainers.append(weakref.ref(trainer.engine))
        return trainer

    def evaluate(*given):
        alive.extend(trainer() for trainer in trainers)
        return measure(*given)

    measure = run.evaluate_on
    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run, "evaluate_on", evaluate)
    gc.disable()
    try:
        sae.train(config(tmp_path / "run"), report=False)
    finally:
        gc.enable()
    assert alive == [None]


def test_schedules():
    rates = [learning_rate(step, 100, 2.0, 10, 0.3) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:70] == [2.0] * 61
    assert rates[85] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.1
    assert [warmup(step, 100, 0.1) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert learning_rate(0, 10, 1.0, 0, 0.0) == 1.0


def test_the_clock_tells_each_step_its_own_rate():
    def at(step: int) -> tuple[float, float]:
        return learning_rate(step, 100, 3e-3, 10, 0.3), warmup(step, 100, 0.05)

    clock = Clock(10, torch.float32, CPU)
    for step in range(43):
        if step % 10 == 0 or step == 37:  # resumed there
            clock.wind(step, at)
        now = clock.tick()
        expected = learning_rate(step, 100, 3e-3, 10, 0.3), 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
        torch.testing.assert_close(torch.stack(now[:3]), torch.tensor(expected), rtol=1e-6, atol=0)
        assert float(now.sparsity) == pytest.approx(min(1.0, step / 5))


def test_weights_that_do_not_fit_name_a_width(monkeypatch, tmp_path):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("sae.start.Trainer", full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    options = {"sae": {"kind": "topk", "k": 2, "d_sae": 5000}, "train": {"n_samples": 512}, "out": tmp_path / "run"}
    expected = r"d_sae=5000 does not fit on cpu \(0.0 GiB free\); lower sae.d_sae to 2500"
    with pytest.raises(sae.UsageError, match=expected):
        sae.train(sae.TrainConfig.model_validate(options), source=torch.randn(300, 8))


def test_device_auto_is_what_is_there(tmp_path):
    options = {"sae": {"kind": "topk", "k": 2, "d_sae": 16}, "train": {"n_samples": 4096, "device": "auto"}}
    result = sae.train(sae.TrainConfig.model_validate(options | {"out": tmp_path / "run"}), source=torch.randn(300, 8))
    assert result.sae.W_dec.device.type == "cpu"
    assert "device: auto" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_short_run_that_is_stopped_while_it_is_measured_resumes_there(tmp_path, monkeypatch):
    def stopped(*parts: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sae.run.evaluate_on", stopped)
        with pytest.raises(KeyboardInterrupt):
            sae.train(config(tmp_path / "run"), report=False)
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert json.loads((saved / "state.json").read_text())["n_steps_done"] == 20
    monkeypatch.setattr("sae.trainer.Trainer.step", stopped)  # no step is left
    sae.train(config(tmp_path / "run"), resume=True, report=False)
    assert (tmp_path / "run/result.json").exists()


def test_what_went_wrong_is_told(tmp_path, caplog):
    sae.train(config(tmp_path / "run", train={"lr": 30.0}), report=False)
    assert "their mean would reconstruct better; lower train.lr=30" in caplog.text
    sae.train(config(tmp_path / "other"), resume=True, report=False)
    assert f"nothing to resume in {tmp_path / 'other'}: starting the run" in caplog.text


@pytest.mark.parametrize(("n_samples", "times"), [(6_400_000, "4,000"), (1280, "0.8")])
def test_a_run_tells_how_often_it_sees_its_rows(tmp_path, caplog, n_samples, times):
    """Of 2000 rows a fifth is held out."""
    run = config(tmp_path / "run", n_samples, source=None)
    with caplog.at_level("INFO", "sae"):
        start(run, as_source(torch.randn(2000, 6)), HeldOut(torch.randn(100, 6)))
    assert f"1600 rows to train on, each {times} times" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "sae"):
        endless = config(tmp_path / "run")
        start(endless, endless.source.open(), HeldOut(torch.randn(100, 6)))
    assert "rows to train on" not in caplog.text


def test_heavy_tails_are_told_with_the_remedy(tmp_path, caplog):
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    sae.train(config(tmp_path / "light"), x, report=False)
    sae.train(config(tmp_path / "few"), x[:100], report=False)  # one of ten rows carries a tenth and more
    assert "of the variance of the activations" not in caplog.text
    x[::500] *= 60
    sae.train(config(tmp_path / "heavy"), x, report=False)
    assert "0.3 % of the rows carry" in caplog.text
    assert "train.clip_rows=3 limits them" in caplog.text
    caplog.clear()
    for name, remedy in (("norm", {"clip_norm": 0.03}), ("rows", {"clip_rows": 3.0})):
        sae.train(config(tmp_path / name, train=remedy), x, report=False)
        assert "of the variance of the activations" not in caplog.text


def test_a_stop_passes_those_who_catch_every_exception():
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)
    stop = pickle.loads(pickle.dumps(Interrupted("stopped at step 3", 2)))
    assert (str(stop), stop.signal_number) == ("stopped at step 3", 2)


def test_a_result_is_printed_in_a_line(tmp_path):
    result = sae.train(config(tmp_path / "run"), report=False)
    assert repr(result).startswith(f"Result(metrics/fvu {result.metrics['metrics/fvu']:.4g}, metrics/l0 ")
    assert len(repr(result)) < 300


def test_activations_may_be_given_by_the_name_of_their_file(tmp_path):
    rows = torch.randn(500, 6)
    np.save(tmp_path / "rows.npy", rows.numpy())
    one = sae.train(config(tmp_path / "one"), rows, report=False)
    for name in (tmp_path / "rows.npy", str(tmp_path / "rows.npy")):
        other = sae.train(config(tmp_path / "other"), name, overwrite=True, report=False)
        assert torch.equal(one.sae.W_dec, other.sae.W_dec)
