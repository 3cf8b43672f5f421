"""`sae bench`: turns and ratios on a made-up clock, rivals that are fake, missing or broken, what the user sees."""

import functools
import json
import logging
import re
import sys
from types import ModuleType

import pytest
import torch
from test_architecture import PATHS, imports

from sae.bench import ceiling, memory, ours
from sae.bench.ceiling import Ceiling
from sae.bench.contenders import contenders
from sae.bench.dense import DenseStep
from sae.bench.loading import RivalFailed, load
from sae.bench.report import Race, Report, share_of_ceiling
from sae.bench.rivals import RIVALS, Rival, Settings
from sae.bench.shapes import SHAPES, Shape, parse_kinds, parse_shapes
from sae.bench.stages import Products, Stage, Stopwatch, stages
from sae.bench.stages import ceiling as stage_ceiling
from sae.bench.timing import WARM_UP_STEPS, Contender, interleaved, ratio
from sae.errors import UsageError
from sae.kernels.native import Native

SMALL = Shape("small", 8, 16, 2, 32)


class Clock:
    """Time that passes when a contender works, at the speed of a machine that others use too."""

    def __init__(self) -> None:
        self.now, self.slowness, self.log = 0.0, 1.0, []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, cost: float, precision: str = "highest") -> Contender:
        def advance() -> None:
            self.log.append((name, torch.get_float32_matmul_precision()))
            self.now += cost * self.slowness

        return Contender(name, advance, precision)


# Timing


def test_contenders_take_turns_and_the_first_moves_up():
    clock = Clock()
    timings = interleaved([clock.contender(name, 1) for name in "abc"], rounds=3, steps=2, clock=clock)
    measured = [name for name, _ in clock.log[3 * (WARM_UP_STEPS + 1) :]]
    assert measured == list("aabbcc" + "bbccaa" + "ccaabb")
    assert [timing.contender.name for timing in timings] == list("abc")
    assert all(timing.seconds == [1, 1, 1] and timing.steps_per_round == 2 for timing in timings)


def test_what_a_contender_does_at_first_alone_is_not_timed():
    clock = Clock()

    def advance() -> None:
        clock.now += 100 if len(clock.log) < 25 else 1
        clock.log.append(("a", ""))

    (timing,) = interleaved([Contender("a", advance)], rounds=2, clock=clock, settling_steps=25)
    assert timing.seconds == [1, 1]
    assert timing.steps_per_round == 1


def test_ratios_are_taken_within_a_round():
    """The machine gets slower and slower, which changes every time and no ratio."""
    clock = Clock()

    def slower() -> None:
        clock.slowness *= 1.001

    fast, slow = interleaved(
        [clock.contender("fast", 1), clock.contender("slow", 3)], rounds=9, steps=1, synchronise=slower, clock=clock
    )
    assert fast.median > 1.01 * fast.minimum
    found = ratio(slow, fast)
    assert found.median == pytest.approx(3, rel=0.01)
    assert 0 <= found.high - found.low < 0.02
    assert ratio(fast, fast).median == 1


def test_steps_left_open_fill_a_turn_of_the_slowest():
    clock = Clock()
    timings = interleaved([clock.contender("a", 0.001), clock.contender("b", 0.05)], rounds=1, clock=clock)
    assert [timing.steps_per_round for timing in timings] == [4, 4]


def test_precision_is_set_for_its_contender_alone():
    clock = Clock()
    before = torch.get_float32_matmul_precision()
    interleaved([clock.contender("a", 1), clock.contender("b", 1, "medium")], rounds=1, steps=1, clock=clock)
    assert set(clock.log) == {("a", "highest"), ("b", "medium")}
    assert torch.get_float32_matmul_precision() == before


def test_ceilings_are_the_best_of_their_repeats():
    found = ceiling.products([SMALL], "cpu", repeats=2) + ceiling.streams("cpu", n_bytes=2**16, repeats=2)
    assert [one.what for one in found] == [
        "product float32",
        "product float32 (medium)",
        "product bfloat16",
        "copy",
        "triad",
    ]
    assert all(len(one.rates) == 2 and one.rate == max(one.rates) > 0 for one in found)


@pytest.mark.parametrize("units", [False, True])
def test_stages_are_those_of_a_real_step(monkeypatch, units):
    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: units)
    kernels = Native(torch.float32, "bf16" if units else "fp32")
    selects_as_it_multiplies = kernels._at_once or kernels._screen_bits
    for kind, selection in (("topk", "top_k"), ("batchtopk", "batch_top_k")):
        found = {stage.name: stage for stage in stages(SMALL, kind, "cpu", 4, lambda: None)}
        if not units or selects_as_it_multiplies:
            assert list(found) == ["centre", selection, "decode", "invert", "update_", "rest"]
            assert found[selection].flops > SMALL.product_flops  # at such sizes it is part of the selection
    names = [stage.name for stage in stages(SMALL, "relu", "cpu", 2, lambda: None)]
    assert names[1] == ("dense_step" if kernels._tiles or not units else "relu")
    monkeypatch.setattr("sae.kernels.small.ENTRIES", 0)
    for kind, selection in (("topk", "top_k"), ("batchtopk", "batch_top_k")):
        found = {stage.name: stage for stage in stages(SMALL, kind, "cpu", 4, lambda: None)}
        product = [] if selects_as_it_multiplies else ["scores"]
        assert list(found) == ["centre", *product, selection, "decode", "invert", "update_", "rest"]
        assert all(len(stage.seconds) == 4 and min(stage.seconds) >= 0 for stage in found.values())
        assert found[(product or [selection])[0]].flops >= SMALL.product_flops


def test_the_products_of_a_dense_step_are_a_stage(monkeypatch):
    monkeypatch.setattr("sae.kernels.has_bf16_units", lambda device: False)
    wide = Shape("wide", 128, 600, 8, 64)  # too large for the step in one call
    found = {stage.name: stage for stage in stages(wide, "relu", "cpu", 2, lambda: None)}
    assert list(found) == ["centre", "relu", "products", "relu_backward", "update_", "rest"]
    assert found["products"].flops == 4 * wide.product_flops
    assert all(len(stage.seconds) == 2 and min(stage.seconds) > 0 for stage in found.values())


def test_a_product_inside_a_stage_counts_for_the_stage():
    class Inner:
        def relu(self) -> torch.Tensor:
            return torch.mm(torch.ones(2, 2), torch.ones(2, 2))

    watch = Stopwatch(Inner(), lambda: None)
    with Products(watch):
        watch.relu()
        assert set(watch.seconds) == {"relu"}
        torch.ones(2, 2).T @ torch.ones(2, 2)
    assert set(watch.seconds) == {"relu", "products"}


@pytest.mark.parametrize(
    ("name", "precision", "share"),
    [
        ("scores", "fp32", "50% of product"),  # of 10 GFLOP/s
        ("scores", "bf16", "5% of product"),  # of 100
        ("scores", "exact", "5% of product"),
        ("products", "fp32", "50% of product"),
        ("products", "bf16", "10% of product"),  # of 50
        ("products", "exact", "50% of product"),
        ("top_k", "bf16", "5% of product"),  # which selects as it multiplies
        ("dense_step", "bf16", "5% of product"),
        ("dense_step", "fp32", "50% of product"),
        ("update_", "bf16", "50% of product"),
    ],
)
def test_a_share_is_of_the_ceiling_in_the_same_numbers(name, precision, share):
    rates = {"product float32": 10.0, "product float32 (medium)": 50.0, "product bfloat16": 100.0}
    ceilings = [Ceiling(what, "small", "GFLOP/s", [rate]) for what, rate in rates.items()]
    ceilings += [Ceiling("product float32", "large", "GFLOP/s", [1.0]), Ceiling("copy", "1 MiB", "GB/s", [1e9])]
    stage = Stage(name, [1.0], 5e9, 1.0, stage_ceiling(name, precision))
    assert share_of_ceiling(SMALL, stage, ceilings) == share


# Shapes and kinds


def test_shapes_by_name_and_by_number():
    assert parse_shapes("S,M") == [SHAPES["S"], SHAPES["M"]]
    assert parse_shapes("L 64,512,8,1024") == [SHAPES["L"], Shape("64,512,8,1024", 64, 512, 8, 1024)]
    assert parse_kinds("relu,topk") == ["relu", "topk"]


def test_options_of_a_kind_reach_the_sae_and_by_a_whole_name_the_training():
    made = ours.config("topk:k=3:train.moments=int8", SMALL, 1e-3, "cpu")
    assert (made.sae.k, made.train.moments) == (3, "int8")
    with pytest.raises(UsageError, match=r"'train.batch_size=7' of kind 'topk' is decided by --shapes, "):
        parse_kinds("topk:train.batch_size=7")
    with pytest.raises(UsageError, match="int9"):
        ours.config("topk:train.moments=int9", SMALL, 1e-3, "cpu")


@pytest.mark.parametrize("text", ["X", "", "64,512", "64,512,8,0", "64,512,1024,8", "-1,2,3,4"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(UsageError):
        parse_shapes(text)


def test_activations_are_reproducible_and_of_unit_mean_squared_norm():
    x = SMALL.activations()
    assert x.shape == (16 * 32, 8)
    assert torch.equal(x, SMALL.activations())
    assert x.square().sum(dim=1).mean() == pytest.approx(1, abs=1e-5)


# Ours


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu", "gated", "jumprelu", "matryoshka", "transcoder"])
def test_our_step_trains(kind):
    begun, batch = ours.trainer(kind, SMALL, SMALL.activations(), 1e-3, "cpu")
    before = begun.sae.W_dec.clone()
    begun.step(*batch())
    assert not torch.equal(begun.sae.W_dec, before)


def test_import_sae_leaves_bench_alone():
    importers = {name for name in PATHS if any(other.startswith("sae.bench") for other in imports(name))}
    outside = {name for name in importers if not name.startswith(("sae.bench", "sae.leaderboard"))}
    assert outside == {"sae.commands.bench"}
    assert not {"sae.commands", "sae.leaderboard"} & set(imports("sae"))


# Rivals


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
def test_the_dense_step_learns(kind):
    x, step = SMALL.activations(1), DenseStep(kind, SMALL, 1e-2, "cpu", 0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = float(step.loss(x))
    for _ in range(20):
        step(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert float(step.loss(x)) < 0.8 * before
    torch.testing.assert_close(step.loss.W_dec.norm(dim=1), torch.ones(SMALL.d_sae))


def test_some_race_on_cuda_alone():
    assert RIVALS["dense torch"].races("topk", "cuda:0")
    assert not RIVALS["dense torch"].races("topk", "cpu")
    assert not RIVALS["dense torch"].races("gated", "cuda")
    assert RIVALS["overcomplete"].races("topk", "cpu")


@pytest.fixture
def fake_dictionary_learning(monkeypatch):
    """A package of that name, whose trainer writes down what it is asked."""
    calls = []

    class TopKTrainer:
        def __init__(self, **options) -> None:
            calls.append(options)

        def update(self, step: int, x: torch.Tensor) -> None:
            calls.append((step, tuple(x.shape)))

    names = ["dictionary_learning", "dictionary_learning.trainers", "dictionary_learning.trainers.top_k"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].TopKTrainer = TopKTrainer
    return calls


@pytest.fixture
def only(monkeypatch):
    """Leaves one rival in the race."""

    def choose(rival: Rival) -> None:
        monkeypatch.setattr("sae.bench.contenders.RIVALS", {rival.name: rival})

    return choose


def missing(shape: Shape, lr: float, device: str, settings: Settings):
    return load("a_package_that_nobody_has.trainers")


def test_a_rival_is_asked_as_its_own_loop_asks_it(fake_dictionary_learning, only):
    only(RIVALS["dictionary-learning"])
    left_out = []
    found = contenders(SMALL, "topk", 1e-3, "cpu", with_rivals=True, medium_too=True, left_out=left_out)
    assert [(one.name, one.precision) for one in found] == [
        ("sae", "highest"),
        ("dictionary-learning", "highest"),
        ("dictionary-learning (medium)", "medium"),
    ]
    found[1].advance()
    options, first, *_, last = fake_dictionary_learning
    assert (options["activation_dim"], options["dict_size"], options["k"], options["lr"]) == (8, 16, 2, 1e-3)
    assert (first, last) == ((0, (32, 8)), (1, (32, 8)))
    assert left_out == []


def test_a_missing_rival_is_one_line_said_once(only, caplog):
    only(Rival("nobody", {"topk": missing, "relu": missing}))
    left_out = []
    for kind in ("topk", "relu"):
        found = contenders(SMALL, kind, 1e-3, "cpu", with_rivals=True, medium_too=True, left_out=left_out)
        assert [one.name for one in found] == ["sae"]
    line = "nobody is left out: ModuleNotFoundError: No module named 'a_package_that_nobody_has'"
    assert left_out == [line]
    assert [record.message for record in caplog.records if "nobody" in record.message] == [line]


def test_a_rival_whose_step_fails_is_left_out(only):
    def broken(shape: Shape, lr: float, device: str, settings: Settings):
        def step(x: torch.Tensor) -> None:
            raise RuntimeError("of no use\nat all")

        return step

    only(Rival("broken", {"topk": broken}))
    left_out = []
    found = contenders(SMALL, "topk", 1e-3, "cpu", with_rivals=True, medium_too=False, left_out=left_out)
    assert len(found) == 1
    assert left_out == ["broken is left out of topk, its step fails: RuntimeError: of no use"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose front page imports what is not there."""
    folder = tmp_path / "half_broken"
    folder.mkdir()
    (folder / "__init__.py").write_text("from half_broken import fine\nimport a_module_that_nobody_has\n")
    (folder / "fine.py").write_text("import half_broken.deep\nvalue = 7\n")
    (folder / "deep.py").write_text("")
    (folder / "bad.py").write_text("import another_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "half_broken"
    for name in [name for name in sys.modules if name.partition(".")[0] == "half_broken"]:
        del sys.modules[name]


def test_a_package_is_entered_without_a_front_page_that_fails(package, caplog):
    caplog.set_level(logging.INFO, logger="sae")
    assert load(f"{package}.fine").value == 7
    assert [record.message for record in caplog.records] == [
        "half_broken is loaded without its __init__, which fails: "
        "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    ]


def test_a_package_that_fails_either_way_leaves_nothing_behind(package):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        load(f"{package}.bad")
    assert package not in sys.modules


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_was_given_back_counts():
    peak = memory.Peak("cpu")
    torch.ones(2**24).sum()
    assert peak.read() - peak.baseline > 3 * 2**24


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_run_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = memory.run(memory.Job("sae", "topk", SMALL, 1e-3, "cpu", 1, steps=2))
    assert found["peak"] >= found["baseline"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_our_steps_alone(monkeypatch):
    monkeypatch.setattr(memory.ours, "advance", lambda *of_a_run: lambda: torch.ones(2**24).sum())
    found = memory.run(memory.Job(memory.STEPS_ALONE, "topk", SMALL, 1e-3, "cpu", 1, steps=2))
    assert found["peak"] - found["baseline"] > 3 * 2**24


def test_a_process_that_fails_is_one_line(monkeypatch):
    class Ended:
        returncode, stdout, stderr = 1, "", "Traceback\nValueError: no\n"

    monkeypatch.setattr(memory.subprocess, "run", lambda *words, **options: Ended)
    with pytest.raises(RivalFailed, match=r"^someone is left out: ValueError: no$"):
        memory.measure(memory.Job("someone", "topk", SMALL, 1e-3, "cpu", 1))


# The command


@pytest.fixture
def bench(run_cli):
    return functools.partial(run_cli, "bench")


def test_bench_prints_and_writes_every_sample(bench, tmp_path, only):
    only(Rival("nobody", {"topk": missing}))
    out = tmp_path / "bench.json"
    code, printed, errors = bench(
        *("steps", "stages", "--shapes", "8,16,2,32", "--kinds", "topk,relu", "--threads", 1, "--rounds", 3),
        *("--steps", 2, "--rivals", "--out", out),
    )
    assert code == 0, errors
    assert "topk, 8,16,2,32: d 8, F 16, k 2, B 32; 3 rounds of 2 steps" in printed
    assert "of ceiling" not in printed
    found = json.loads(out.read_text())
    assert [(row["name"], row["kind"], len(row["seconds"])) for row in found["steps"]] == [
        ("sae", "topk", 3),
        ("sae", "relu", 3),
    ]
    assert found["steps"][0]["shape"] == {"name": "8,16,2,32", "d_in": 8, "d_sae": 16, "k": 2, "batch": 32}
    assert found["machine"]["threads"] == 1
    assert found["machine"]["command"].startswith("sae bench steps stages --shapes 8,16,2,32")
    assert len(found["left_out"]) == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["step"], ["unknown part 'step'", "did you mean 'steps'?"]),
        (["--shapes", "s"], ["unknown shape 's'", "known: L, M, S"]),
        (["--shapes", "64,512,8"], ["four positive whole numbers d,F,k,B", "'64,512,8'"]),
        (["--kinds", "batchtop"], ["unknown kind 'batchtop'", "did you mean 'batchtopk'?"]),
        (["--rounds", "0"], ["--rounds must be at least 1, got 0"]),
        (["--device", "nowhere"], ["--device 'nowhere' cannot be used", "try cpu"]),
        (["--out", "/nowhere/at/all.json"], ["--out /nowhere/at/all.json"]),
        (["--precision", "medium"], ["--precision: unknown 'medium'", "did you mean 'medium-too'?", "known: default"]),
        (["--precision", "medium-too"], ["--precision medium-too lets rivals", "give --rivals"]),
        (["memory", "--rivals", "--precision=medium-too"], ["the part steps"]),
    ],
)
def test_bad_words_are_one_line(bench, words, parts):
    code, _, errors = bench(*words)
    assert code == 2
    assert errors.startswith("sae: error: ")
    assert len(errors.splitlines()) == 1
    for part in parts:
        assert part in errors


def test_a_file_that_cannot_be_written_is_told_before_measuring(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("sae.bench.run.os.access", lambda path, mode: False)
    small = ("steps", "--shapes", "8,16,2,32", "--kinds", "topk", "--rounds", 1, "--steps", 1)
    code, printed, errors = bench(*small, "--out", tmp_path / "bench.json")
    assert (code, printed) == (2, "")
    assert f"--out {tmp_path / 'bench.json'} cannot be written" in errors


def test_ceilings_give_stages_a_column(bench, monkeypatch):
    monkeypatch.setattr(ceiling.streams, "__defaults__", (2**16, 1))
    monkeypatch.setattr(ceiling.products, "__defaults__", (1,))
    code, printed, errors = bench("ceiling", "stages", "--shapes", "8,16,2,32", "--kinds", "topk", "--rounds", 2)
    assert code == 0, errors
    assert "of ceiling" in printed
    assert re.search(r"top_k .*% of (product|memory)", printed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_one_line(bench):
    code, _, errors = bench("--device", "cuda")
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert "--device 'cuda' cannot be used" in errors


def test_a_report_is_plain_values():
    clock = Clock()
    timings = interleaved([clock.contender("sae", 1), clock.contender("slow", 2)], rounds=1, steps=1, clock=clock)
    report = Report({}, races=[Race(SMALL, "topk", timings)], memory=[memory.Memory("sae", "topk", "S", 1, 3)])
    values = json.loads(json.dumps(report.as_dict()))
    assert values["steps"][1]["ratio"] == {"median": 2, "low": 2, "high": 2}
    assert values["memory"][0]["growth"] == 2
