from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from sae import Sparsifier, UsageError, load_config
from sae.config import SAEConfig, SourceConfig, TrainConfig, parse_config
from sae.config_base import Section
from sae.config_text import flags

SMALLEST = {"source": {"kind": "array", "path": "acts.npy"}, "sae": {"kind": "topk", "d_sae": 256, "k": 3}}


def test_the_smallest_configuration_is_enough():
    config = parse_config(SMALLEST)
    assert config.lr == 3e-3
    assert config.n_steps == -(-config.train.n_samples // config.train.batch_size)


def test_a_kind_says_what_it_makes():
    for base, method in ((SourceConfig, "open"), (SAEConfig, "build"), (Sparsifier, "forward")):
        unfinished = type("Unfinished", (base,), {"__module__": __name__})
        with pytest.raises(TypeError, match=f"abstract class Unfinished .*{method}"):
            unfinished(**({} if base is Sparsifier else {"kind": "unfinished"}))


def test_flags_reach_options_within_options():
    sections = {"sae": {"kind": "transcoder", "d_sae": 8, "base": {"kind": "topk", "k": 2, "multi_k": 4}}}
    assert parse_config(sections, ["--sae.base.k", "3"]).sae.base["k"] == 3
    words = ["--sae.base.k", "2.5", "--sae.base.kind", "batchtopk"]
    base = parse_config(sections, words).sae.base
    assert (base["kind"], base["k"], "multi_k" in base) == ("batchtopk", 2.5, False)
    assert sections["sae"]["base"] == {"kind": "topk", "k": 2, "multi_k": 4}
    whole = parse_config(sections, ["--sae.base.k", "5", "--sae.base", "{kind: topk, k: 1}"]).sae.base
    assert (whole["k"], whole["multi_k"]) == (5, None)
    with pytest.raises(UsageError, match=r"train\.lr: .* got \{'peak': 3\}"):
        parse_config(sections, ["--train.lr.peak", "3"])


def test_flags_override_the_file_and_kind_changes_the_family(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("source: {kind: toy}\nsae: {kind: topk, d_sae: 64, k: 3}\ntrain: {lr: 1e-3}\n")
    words = [
        "--sae.kind",
        "relu",
        "--sae.l1_coefficient",
        "0.2",
        "--train.n_samples=1_000",
        "--train.batch-size",
        "10",
    ]
    config = load_config(path, words)
    assert config.sae.kind == "relu"
    assert config.sae.l1_coefficient == 0.2
    assert config.sae.d_sae == 64
    assert (config.train.lr, config.train.n_samples, config.train.batch_size) == (1e-3, 1000, 10)
    assert load_config(path, ["--sae.kind", "batchtopk"]).sae.k == 3


def test_what_is_written_reads_back_equal(tmp_path):
    config = parse_config(SMALLEST, ["--sae.kind", "batchtopk", "--sae.k", "2.56"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sae.kk", "3"], r"unknown key 'kk' for kind 'topk'; did you mean 'k'\?"),
        (["--train.batchsize", "3"], r"unknown key 'train.batchsize'; did you mean 'batch_size'\?"),
        (["--trian.lr", "3"], r"unknown key 'trian'; did you mean 'train'\?"),
        (["--sae.kind", "topkk"], r"unknown kind 'topkk'; did you mean 'topk'\?"),
        (["--sae.k", "1000"], r"k must lie in 1..d_sae=256, got 1000; lower k or raise d_sae"),
        (["--sae.k", "0"], r"sae.k: Input should be greater than 0, got 0"),
        (["--train.lr", "fast"], r"train.lr: .*got 'fast'"),
        (["--log.wandb", "yes"], r"log.wandb: .*'disabled', 'offline' or 'online'"),
        (["--train.lr"], r"--train.lr needs a value"),
        (["lr", "3"], r"expected a flag such as --sae.k 3, got 'lr'"),
        (["--sae", "3"], r"sae: "),
        (["--sae", "!!map foo"], r"not valid YAML"),
        (["--sae.k", "2024-13-45"], r"not valid YAML"),
        (["--self.x", "3"], r"unknown key 'self'"),
        (["--train.lr="], r"--train\.lr has an empty value; is a shell variable unset\? For none, write null"),
        (["--train.lr", ""], r"--train\.lr has an empty value"),
    ],
)
def test_faults_are_named_in_one_line(words, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_config(SMALLEST, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\xff", "1: 2"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        load_config(path)
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")


def test_a_key_that_is_given_twice_is_named_with_its_place(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("sae: {kind: topk, d_sae: 8, k: 2}\ntrain:\n  lr: 1.0e-3\n  lr: 3.0e-3\n")
    with pytest.raises(UsageError, match=r"bad\.yaml is not valid YAML: 'lr' is given twice .*line 4"):
        load_config(path)
    with pytest.raises(UsageError, match="the value is not valid YAML"):
        flags(["--sae", "{k: 2, k: 3}"])
    path.write_text("base: {inner: &base {<<: &deep {d_sae: 8, k: 2}, k: 3}}\nsae: {<<: *base, kind: topk, k: 3}\n")
    with pytest.raises(UsageError, match="unknown key 'base'"):  # what a merge brings may be set again
        load_config(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sae.k", "true"], r"sae\.k: must be a number, got true"),
        (["--train.lr", "no"], r"train\.lr: must be a number, got false"),
        (["--log.every", "on"], r"log\.every: must be a number, got true"),
        (["--sae.prefixes", "[true, 8]"], r"sae\.prefixes: must be a number, got true"),
    ],
)
def test_a_truth_value_is_no_number(words, message):
    with pytest.raises(UsageError, match=message):
        parse_config(SMALLEST, words)
    assert parse_config(SMALLEST, ["--sae.unit_norm_decoder", "false"]).sae.unit_norm_decoder is False


class Odd(Section):
    """Every way to want a number, or not."""

    plain: Annotated[int, Field(gt=0)] = 1
    optional: Annotated[int, Field(gt=0)] | None = None
    several: tuple[int, ...] = ()
    either: bool | float = 1.0
    named: float | Literal[False] = 1.0
    anything: Any = None
    called: Callable[[int], float] | None = None


@pytest.mark.parametrize("given", [{"plain": True}, {"optional": True}, {"several": [2, True]}])
def test_a_truth_value_is_no_number_however_it_is_wanted(given):
    with pytest.raises(ValueError, match="must be a number, got true"):
        Odd(**given)


def test_a_truth_value_is_taken_where_one_is_wanted():
    odd = Odd(either=True, named=False, anything=True, called=abs, plain=2, several=[1, 2])
    assert (odd.either, odd.named, odd.anything, odd.plain, odd.several) == (True, False, True, 2, (1, 2))


def test_a_sweep_is_not_trained_as_one_run(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text("sae: {kind: topk, d_sae: 8, k: 2}\nsweep: {grid: {sae.k: [1, 2]}}\n")
    with pytest.raises(UsageError, match=r"use `sae sweep .*many\.yaml`"):
        load_config(path)


def test_in_python_faults_are_one_line_too():
    with pytest.raises(UsageError) as raised:
        TrainConfig(sae={"kind": "topk", "d_sae": 8, "k": 9}, train={"lr": -1.0}, trian={})
    assert "k must lie in 1..d_sae=8, got 9" in str(raised.value)
    assert "train.lr: Input should be greater than 0, got -1.0" in str(raised.value)
    assert "unknown key 'trian'; did you mean 'train'?" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_configurations_cannot_be_changed():
    config = TrainConfig.model_validate(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0


def test_a_glob_is_no_alias_of_yaml():
    assert flags(["--source.path", "*.npy"]) == {"source.path": "*.npy"}


def test_a_whole_section_comes_before_single_fields_of_it():
    """In whatever order they are given: a field is never lost."""
    section = ["--sae", "{kind: relu, d_sae: 60}"]
    for words in ([*section, "--sae.l0", "1.8"], ["--sae.l0", "1.8", *section]):
        made = parse_config({"sae": {"kind": "topk", "d_sae": 8, "k": 2}}, words)
        assert (made.sae.kind, made.sae.d_sae, made.sae.l0) == ("relu", 60, 1.8)
    with pytest.raises(UsageError, match=r"nonsense"):
        parse_config({"sae": {"kind": "topk", "d_sae": 8, "k": 2}}, ["--sae.nonsense", "5", *section])


@pytest.mark.parametrize("words", [["--sae.aux_coefficient", ".inf"], ["--train.lr", ".nan"]])
def test_what_is_no_number_is_refused(words):
    with pytest.raises(UsageError, match=r"Input should be a finite number, got (inf|nan)"):
        parse_config({"sae": {"kind": "topk", "d_sae": 8, "k": 2}}, words)
