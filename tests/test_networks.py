"""Any network: what is read where, what is harvested, and that a stop changes nothing."""

import json
import os
import signal

import pytest
import torch
from torch import Tensor, nn

import sae
from sae.errors import Interrupted, UsageError
from sae.hooks import fingerprint
from sae.networks.reader import Reader, Site
from sae.stores import Store
from sae.stores.writer import EVERY
from toymodels.streams import generator

D = 6


class Network(nn.Module):
    """Layers of which the second overwrites what the first put out; the last must not be reached needlessly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inplace = nn.Linear(4, D), nn.ReLU(inplace=True)
        self.pair = Pair()
        self.last = Counted()
        self.unused = nn.Linear(2, 2)
        for weight in self.parameters():
            nn.init.normal_(weight, generator=generator(0, "test", "network", weight.numel()))
        self.eval()

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.last(self.pair(self.inplace(self.first(x + shift)), scale=2.0)[0])


class Pair(nn.Module):
    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, str]:
        return x * scale, "cache"


class Counted(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def batches(n: int = 30, size: int = 8, positions: int = 3) -> list[Tensor]:
    stream = generator(0, "test", "inputs")
    return [torch.randn(size, positions, 4, generator=stream) for _ in range(n)]


def same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b), (a.shape, b.shape)


# Reading


def test_reads_what_a_module_puts_out_and_what_goes_in():
    network, x = Network(), batches(1)[0]
    before = network.first(x)
    assert (before < 0).any()  # so that working in place would show
    found = Reader(network, [Site("first"), Site("pair", "input"), Site("pair")])(x)
    same(found[Site("first")], before)
    same(found[Site("pair", "input")], before.relu())
    same(found[Site("pair")], 2 * before.relu())


def test_runs_no_further_than_it_must():
    network = Network()
    Reader(network, [Site("pair")])(batches(1)[0])
    assert network.last.calls == 0
    Reader(network, [Site("last")])(batches(1)[0])
    assert network.last.calls == 1


class Repeated(nn.Module):
    """Runs one module twice, and works in place on what it put out."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.then = nn.Linear(4, 4), nn.Identity()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.again(self.again(x).relu_()).relu_())


def test_of_a_module_that_runs_twice_the_first_time_counts():
    network, x = Repeated(), torch.randn(5, 4, generator=generator(0, "test"))
    first = network.again(x)
    for sites in ([Site("again")], [Site("again"), Site("then")]):
        same(Reader(network, sites)(x)[Site("again")], first)


def test_hooks_are_gone_afterwards():
    network, x = Network(), batches(1)[0]
    expected = network(x)
    with pytest.raises(UsageError):
        Reader(network, [Site("unused")])(x)
    Reader(network, [Site("pair")])(x)
    same(network(x), expected)


def test_batches_come_as_tensors_tuples_and_mappings():
    network, x = Network(), batches(1)[0]
    reader, site = Reader(network, [Site("first")]), Site("first")
    same(reader((x, "label"))[site], reader(x)[site])
    same(reader({"x": x, "shift": 1.0})[site], reader(x + 1)[site])


def test_what_cannot_be_read_is_told():
    network, x = Network(), batches(1)[0]
    with pytest.raises(UsageError, match=r"no module 'frst'.*such as first"):
        Reader(network, [Site("frst")])
    with pytest.raises(UsageError, match="does not run unused"):
        Reader(network, [Site("unused")])(x)
    with pytest.raises(UsageError, match="training mode"):
        Reader(Network().train(), [Site("first")])


# Harvesting


def rows_of(path, split="training") -> Tensor:
    rows = Store(path).rows(split)
    return rows.read(0, len(rows))


def test_a_harvest_holds_whole_inputs_out(tmp_path):
    network, inputs = Network(), batches()
    source = sae.harvest(network, "pair", inputs, tmp_path)
    with torch.no_grad():
        expected = torch.cat([network.pair(network.first(x).relu(), 2.0)[0] for x in inputs])
    number = torch.arange(len(expected)) % EVERY
    same(rows_of(tmp_path), expected[(number != 0) & (number != EVERY // 2)].flatten(0, 1))
    same(source.held_out("calibration", 10**6).x, expected[number == 0].flatten(0, 1))
    same(source.held_out("evaluation", 4).x, expected[number == EVERY // 2].flatten(0, 1)[:4])
    assert source.d_in == D
    seen = torch.cat([next(source.batches(24, 0, start)) for start in range(27)])
    assert len(seen.unique(dim=0)) == len(rows_of(tmp_path)) == 24 * 27


def test_a_store_trains_an_sae(tmp_path):
    source = sae.harvest(Network(), "pair", batches(), tmp_path / "acts")
    assert "acts" in repr(source)
    config = sae.TrainConfig(
        source={"kind": "store", "path": tmp_path / "acts"},
        sae={"kind": "topk", "d_sae": 8, "k": 2},
        train={"n_samples": 512, "batch_size": 64},
        out=tmp_path / "run",
    )
    result = sae.train(config, report=False)
    assert sae.evaluate_run(tmp_path / "run").metrics == result.metrics
    sae.train(config.model_copy(update={"source": None}), source=source, overwrite=True, report=False)
    assert sae.evaluate_run(tmp_path / "run").metrics == result.metrics  # the run says which store it was


def test_a_target_and_an_arrangement(tmp_path):
    conv = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Conv2d(5, 7, 1)).eval()
    images = [(torch.randn(10, 1, 6, 6, generator=generator(0, "test", n)), "labels") for n in range(6)]
    source = sae.harvest(conv, "0", images, tmp_path, target="1", rows=lambda acts: acts.flatten(2).mT)
    assert (source.d_in, source.d_out) == (5, 7)
    held = source.held_out("evaluation", 16)
    with torch.no_grad():
        first = conv[0](images[1][0])[0]  # input number 10
        close = torch.testing.assert_close
        close(held.x, first.flatten(1).T)
        close(held.target, conv[1](first[None])[0].flatten(1).T)


def test_images_that_nobody_arranged_are_told(tmp_path, caplog):
    caplog.set_level("INFO", "sae")
    conv = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(1)).eval()
    images = [torch.randn(10, 1, 6, 6) for _ in range(6)]
    sae.harvest(conv, "0", images, tmp_path / "axis")
    assert "0: [10, 5, 4, 4], rows of width 4; is it another axis? set rows=" in caplog.text
    sae.harvest(conv, "1", images, tmp_path / "flat")
    assert "1: [10, 80], rows of width 80\n" in caplog.text


def test_other_weights_do_not_go_on(tmp_path):
    with pytest.raises(Interrupted):
        sae.harvest(Network(), "pair", stopped_after(batches(), 10, "signal"), tmp_path)
    other = Network()
    with torch.no_grad():
        other.unused.weight[0, 0] += 1
    with pytest.raises(UsageError, match="begun with other values: weights was"):
        sae.harvest(other, "pair", batches(), tmp_path, resume=True)
    assert fingerprint(Network()) == fingerprint(Network())


def test_a_run_is_no_place_for_a_store(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UsageError, match="holds a run; give another --out"):
        sae.harvest(Network(), "pair", batches(), tmp_path)


def test_dtypes(tmp_path):
    sae.harvest(Network(), "pair", batches(), tmp_path / "half", dtype="float16")
    sae.harvest(Network().to(torch.bfloat16), "pair", [x.bfloat16() for x in batches()], tmp_path / "bf16")
    assert rows_of(tmp_path / "half").dtype == torch.float16
    assert rows_of(tmp_path / "bf16").dtype == torch.bfloat16
    large = [1e5 * x for x in batches()]
    with pytest.raises(UsageError, match=r"acts of batch 0 is up to .*e\+0\d, more than float16 can hold"):
        sae.harvest(Network(), "pair", large, tmp_path / "large", dtype="float16")
    with pytest.raises(UsageError, match=r"acts of batch 1 holds NaN or infinity"):
        sae.harvest(Network(), "pair", [batches(1)[0], batches(1)[0] / 0], tmp_path / "nan")


def stopped_after(inputs, n: int, how: str):
    """The inputs, with an end to the process behind n of them."""
    for number, batch in enumerate(inputs):
        if number == n and how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        elif number == n:
            raise RuntimeError("killed")
        yield batch


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_stop_changes_nothing(tmp_path, monkeypatch, how):
    monkeypatch.setattr("sae.stores.writer.SHARD_BYTES", 4000)  # a shard every seven batches
    sae.harvest(Network(), "pair", batches(), tmp_path / "whole")
    with pytest.raises(Interrupted if how == "signal" else RuntimeError):
        sae.harvest(Network(), "pair", stopped_after(batches(), 10, how), tmp_path / "stopped")
    assert not Store(tmp_path / "stopped").manifest.complete
    with pytest.raises(UsageError, match="is incomplete; run its `sae harvest` again with --resume"):
        sae.open_store(tmp_path / "stopped")
    with pytest.raises(UsageError, match="already holds a store"):
        sae.harvest(Network(), "pair", batches(), tmp_path / "stopped")
    (tmp_path / "stopped" / "shard-00099.safetensors.partial").write_text("half a shard")
    begun = Store(tmp_path / "stopped").manifest.n_batches
    assert begun == (11 if how == "signal" else 7)
    sae.harvest(Network(), "pair", batches(), tmp_path / "stopped", resume=True)
    for split in ("training", "calibration", "evaluation"):
        same(rows_of(tmp_path / "stopped", split), rows_of(tmp_path / "whole", split))
    assert not list((tmp_path / "stopped").glob("*.partial"))


def test_an_old_store_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    sae.harvest(Network(), "pair", batches(), tmp_path)
    before = rows_of(tmp_path)
    for bad in ([*batches(2), batches(1)[0] / 0], batches(1)):  # a batch later on; too few
        with pytest.raises(UsageError):
            sae.harvest(Network(), "first", bad, tmp_path, overwrite=True)
        same(rows_of(tmp_path), before)
    monkeypatch.setattr("sae.stores.writer.SHARD_BYTES", 4000)
    sae.harvest(Network(), "first", batches(), tmp_path, overwrite=True)
    assert len(list(tmp_path.glob("shard-*"))) == len(Store(tmp_path).manifest.shards) == 5
    sae.harvest(Network(), "pair", batches(3), tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00000.safetensors"]


@pytest.mark.parametrize("name", ["shard-00007.safetensors", "tokens.safetensors"])
def test_files_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=f"holds {name}, which belongs to no store"):
            sae.harvest(Network(), "pair", batches(), tmp_path, **how)
    assert (tmp_path / name).read_text() == "mine"


def test_inputs_must_be_the_same_and_as_many(tmp_path):
    with pytest.raises(Interrupted):
        sae.harvest(Network(), "pair", stopped_after(batches(), 10, "signal"), tmp_path)
    with pytest.raises(UsageError, match="the inputs end after 3 batches, but 11 had been read"):
        sae.harvest(Network(), "pair", batches(3), tmp_path, resume=True)
    with pytest.raises(UsageError, match="inputs are batches, got one tensor"):
        sae.harvest(Network(), "pair", batches(1)[0], tmp_path / "tensor")


class Windows(nn.Module):
    """Puts the parts of an image where images were, as windowed attention does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, 4)


def test_parts_of_an_input_are_not_taken_for_inputs(tmp_path):
    images = [torch.randn(5, 8, 4) for _ in range(10)]
    with pytest.raises(UsageError, match=r"\[20, 2, 4\] .* must be \[5 inputs, ..., d\].*rows="):
        sae.harvest(Windows().eval(), "", images, tmp_path)
    source = sae.harvest(Windows().eval(), "", images, tmp_path, rows=lambda acts: acts.reshape(5, 8, 4))
    same(source.held_out("calibration", 10**6).x, torch.cat([images[0][0], images[4][0], images[8][0]]))


def test_a_module_can_be_its_own_target(tmp_path):
    source = sae.harvest(Network(), "pair", batches(), tmp_path, target="pair")
    held = source.held_out("evaluation", 50)
    same(held.x, held.target)


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path):
    sae.harvest(Network(), "pair", batches(), tmp_path)
    with pytest.raises(UsageError, match="module was 'pair', now 'first'"):
        sae.harvest(Network(), "first", batches(), tmp_path, resume=True)
    with pytest.raises(UsageError, match="dtype was 'float32', now 'float16'"):
        sae.harvest(Network(), "pair", batches(), tmp_path, resume=True, dtype="float16")
    with pytest.raises(UsageError, match="NaN"):
        sae.harvest(Network(), "first", [x / 0 for x in batches()], tmp_path, overwrite=True)
    assert sae.open_store(tmp_path).store.manifest.origin["module"] == "pair"  # nothing was lost
    sae.harvest(Network(), "first", batches(), tmp_path, overwrite=True)
    assert json.loads((tmp_path / "store.json").read_text())["origin"]["module"] == "first"


def test_too_few_inputs_and_odd_shapes_are_told(tmp_path):
    with pytest.raises(UsageError, match="8 inputs leave no rows for evaluation"):
        sae.harvest(Network(), "pair", batches(1), tmp_path / "few")
    with pytest.raises(UsageError, match=r"batch 0 at first is \[6\] of torch.float32.*rows="):
        sae.harvest(Network(), "first", [torch.zeros(4)], tmp_path / "vector")
    with pytest.raises(UsageError, match="batch 1 has acts of width 3, those before it 4"):
        sae.harvest(nn.Identity().eval(), "", [torch.zeros(2, 4), torch.zeros(2, 3)], tmp_path / "widths")
