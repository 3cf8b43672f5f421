"""What latents fire for: found examples against a search through everything, and the page that shows them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.config import SourceConfig
from sae.latents.describe import describe, evenly
from sae.latents.examples import NOWHERE, codes_at, encode, find_examples
from sae.latents.logits import logits_of
from sae.latents.passages import open_texts
from sae.networks.harvest import harvest_model
from sae.report.latents import snippet

N_EXAMPLES = 3


def config_of(tiny, out, **more):
    return sae.TrainConfig(
        source=tiny.section(**more),
        sae={"kind": "topk", "d_sae": 40, "k": 3},
        train={"n_samples": 8192, "batch_size": 128, "warmup_steps": 5},
        evaluation={"n_samples": 200},
        out=out,
    )


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run on a language model; its directory is read, and written to by `sae latents` alone."""
    out = tmp_path_factory.mktemp("latents") / "run"
    sae.train(config_of(tiny, out), report=False)
    return out


def search(tiny, model, n_contexts, **more):
    """Every code of every training context, one after the other: [(latent, context, position, code)]."""
    source = SourceConfig.of_kind(tiny.section(**more)).open()
    network, found = tiny.network(), []
    for context in source.order["training"][:n_contexts].tolist():
        tokens = source.contexts.tokens[context : context + 1]
        kept = source.contexts.kept(tokens)[0]
        with torch.no_grad():
            x = network(tokens.long(), output_hidden_states=True).hidden_states[2][0][kept]
            dense = encode(model, x).dense()
        for row, position in enumerate(kept.nonzero().squeeze(1).tolist()):
            for latent in dense[row].nonzero().squeeze(1).tolist():
                found.append((latent, context, position, float(dense[row, latent])))
    return found


def test_examples_are_the_largest_codes_of_different_contexts(tiny, run):
    model, texts = sae.load(run), open_texts(config_of(tiny, run).source, 10**9)
    n_contexts = len(texts.order)
    assert n_contexts == 450
    examples = find_examples(model, texts.passages(), N_EXAMPLES)
    everything = search(tiny, model, n_contexts)
    assert examples.n_rows == sum(len(passage.x) for passage in texts.passages())
    for latent in range(model.d_sae):
        own = [entry for entry in everything if entry[0] == latent]
        assert examples.frequency[latent] == pytest.approx(len(own) / examples.n_rows, abs=1.5 / examples.n_rows)
        best = {}
        for _, context, position, code in own:
            if code > best.get(context, (0, 0))[0]:
                best[context] = (code, position)
        ranked = sorted(best.items(), key=lambda item: -item[1][0])[:N_EXAMPLES]
        n = len(ranked)
        expected = torch.tensor([code for _, (code, _) in ranked])
        torch.testing.assert_close(examples.value[latent, :n], expected, rtol=1e-4, atol=1e-5)
        for place in range(n):
            context, position = int(examples.context[latent, place]), int(examples.position[latent, place])
            assert best[context][0] == pytest.approx(float(examples.value[latent, place]), rel=1e-4, abs=1e-5)
            assert position == best[context][1]
        assert (examples.context[latent, n:] == NOWHERE).all()
        assert (examples.value[latent, n:] == 0).all()


def test_few_rows_are_the_first(tiny, run):
    texts = open_texts(config_of(tiny, run).source, 300)
    n = sum(len(passage.x) for passage in texts.passages())
    assert 300 <= n < 300 + 12


def test_a_store_shows_what_its_model_shows(tiny, run, tmp_path):
    config = config_of(tiny, run)
    harvest_model(config.source, tmp_path / "acts")
    stored = open_texts(sae.StoreSourceConfig(path=tmp_path / "acts"), 10**9)
    live, model = open_texts(config.source, 10**9), sae.load(run)
    ours, theirs = (find_examples(model, texts.passages(), N_EXAMPLES) for texts in (stored, live))
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-4, atol=1e-5)
    for name in ("context", "position"):  # rounding may turn two around
        assert (getattr(ours, name) == getattr(theirs, name)).float().mean() > 0.98
    assert ours.n_rows == theirs.n_rows
    assert torch.equal(stored.tokens, live.tokens)


def test_codes_at_are_those_of_the_contexts(tiny, run):
    model, texts = sae.load(run), open_texts(config_of(tiny, run).source, 10**9)
    context, length = int(texts.order[7]), texts.tokens.shape[1]
    codes = codes_at(model, texts.passages(), [(context, 3), (context, 11), (10**6, 0)], length)
    assert set(codes) == {(context, 3), (context, 11)}
    expected = torch.zeros(2, length)
    for latent, where, position, code in search(tiny, model, 8):
        if where == context and latent in (3, 11):
            expected[(3, 11).index(latent), position] = code
    torch.testing.assert_close(torch.stack([codes[context, 3], codes[context, 11]]), expected, rtol=1e-4, atol=1e-5)


def test_a_selection_goes_from_frequent_to_rare():
    frequency = torch.tensor([0.0, 0.3, 0.1, 0.0, 0.2, 0.5])
    assert evenly(frequency, 10) == [5, 1, 4, 2]
    assert evenly(frequency, 2) == [5, 2]
    assert evenly(torch.zeros(4), 3) == []


def test_the_page_shows_texts_around_the_largest_codes(tiny, run, run_cli):
    outcome = run_cli("latents", run, "--n-latents", 5, "--n-examples", 2)
    assert outcome.code == 0, outcome.err
    page = (run / "latents.html").read_text()
    shown = json.loads((run / "latents.json").read_text())
    tensors = load_file(run / "latents.safetensors")
    assert len(shown["latents"]) == 5
    assert "report.html" not in page  # there is none
    tokenizer, texts = tiny.tokenizer(), open_texts(config_of(tiny, run).source, 10**9)
    for latent in shown["latents"]:
        number = latent["latent"]
        assert f"Latent {number}<" in page
        for rank, example in enumerate(latent["examples"]):
            context, position = example["context"], example["position"]
            assert (context, position) == (tensors["context"][number, rank], tensors["position"][number, rank])
            assert example["tokens"][example["peak"]] == tokenizer.decode([texts.tokens[context, position]])
            assert example["values"][example["peak"]] == max(example["values"])
            assert max(example["values"]) == pytest.approx(float(tensors["value"][number, rank]), rel=1e-3)
    (run / "report.html").touch()
    run_cli("latents", run, "--which", 7, 0)
    assert [latent["latent"] for latent in json.loads((run / "latents.json").read_text())["latents"]] == [7, 0]
    page = (run / "latents.html").read_text()
    assert "Those that were asked for" in page
    assert 'href="report.html"' in page


def test_texts_are_no_markup():
    drawn = snippet(["a", "<script>", "\n", " b"], [0.0, 1.0, 0.5, 0.01], 1, 1.0)
    assert "&lt;script&gt;" in drawn
    assert "<script>" not in drawn
    assert '<span class="s9 peak">' in drawn
    assert "⏎" in drawn
    assert "\\x12" in snippet(["\x12"], [1.0], 0, 1.0)
    assert drawn.count("class=") == 2  # .01 of the largest has no shade


def test_tokens_without_a_tokenizer_are_numbers(tiny, tmp_path, run_cli):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 290, (100, 9)))
    sae.train(config_of(tiny, tmp_path / "run", texts=None, tokens=str(tmp_path / "tokens.npy")), report=False)
    assert run_cli("latents", tmp_path / "run", "--n-latents", 3).code == 0
    tokens = json.loads((tmp_path / "run" / "latents.json").read_text())["latents"][0]["examples"][0]["tokens"]
    assert all(token.strip().isdigit() for token in tokens)


def test_mistakes_are_one_line(run, tmp_path, run_cli):
    run_cli("latents", run, "--which", 40).assert_refused("numbered 0 to 39, got 40")
    run_cli("latents", run, "--n-rows", 0).assert_refused("--n-rows must be at least 1, got 0")
    run_cli("latents", tmp_path).assert_refused(str(tmp_path))
    np.save(tmp_path / "acts.npy", np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32))
    array = {"kind": "array", "path": tmp_path / "acts.npy"}
    out = tmp_path / "array"
    sae.train(
        sae.TrainConfig(
            source=array, sae={"kind": "topk", "d_sae": 8, "k": 2}, train={"n_samples": 512, "batch_size": 64}, out=out
        ),
        report=False,
    )
    run_cli("latents", out).assert_refused("one of kind array; use model or store")
    sae.harvest(torch.nn.Identity().eval(), "", list(torch.randn(30, 8, 4)), tmp_path / "store")
    store = {"kind": "store", "path": tmp_path / "store"}
    sae.train(
        sae.TrainConfig(
            source=store,
            sae={"kind": "topk", "d_sae": 8, "k": 2},
            train={"n_samples": 512, "batch_size": 64},
            out=out / "b",
        ),
        report=False,
    )
    run_cli("latents", out / "b").assert_refused("has no texts")


# What they write


def judged(weight, scale, rows, centred):
    """Every logit of every row, by the formula, in standard deviations over the vocabulary."""
    rows = rows - rows.mean(dim=1, keepdim=True) if centred else rows
    logits = torch.einsum("vd,d,ld->lv", weight, scale, rows)
    return (logits - logits.mean(dim=1, keepdim=True)) / logits.std(dim=1, keepdim=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_raised_tokens_are_those_of_the_largest_logits(tiny, family):
    """A LayerNorm centres, an RMSNorm does not, and Gemma keeps its scale less 1."""
    from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM  # slow to import

    own = {"vocab_size": 70, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    own |= {"intermediate_size": 24, "num_key_value_heads": 2}
    network, norm, more = {
        "gpt2": lambda: (tiny.network(), "transformer.ln_f", 0.0),
        "llama": lambda: (LlamaForCausalLM(LlamaConfig(**own)), "model.norm", 0.0),
        "gemma": lambda: (
            GemmaForCausalLM(GemmaConfig(**own, head_dim=8)),
            "model.norm",
            1.0,
        ),
    }[family]()
    weight = network.get_submodule(norm).weight
    with torch.no_grad():
        weight.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)))
    rows = torch.randn(150, 16, generator=torch.Generator().manual_seed(2)) + 0.5
    head = network.get_output_embeddings().weight.detach()
    expected = judged(head, weight.detach() + more, rows, centred=family == "gpt2")
    found = logits_of(network, rows, 5)
    top, bottom = expected.topk(5), (-expected).topk(5)
    torch.testing.assert_close(found.raised_by, top.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.lowered_by, -bottom.values, rtol=1e-3, atol=1e-3)
    assert float((found.raised == top.indices).float().mean()) > 0.99  # near ties
    assert float((found.lowered == bottom.indices).float().mean()) > 0.99
    assert logits_of(network, rows[:, :8], 5) is None


def test_the_page_says_what_latents_raise_where_they_write_to_the_residual_stream(tiny, run, run_cli, tmp_path):
    assert run_cli("latents", run, "--which", 3, 7).code == 0
    model, network, tokenizer = sae.load(run), tiny.network(), tiny.tokenizer()
    norm = network.transformer.ln_f.weight.detach()
    expected = judged(network.get_output_embeddings().weight.detach(), norm, model.W_dec[[3, 7]], centred=True)
    shown = json.loads((run / "latents.json").read_text())["latents"]

    def word(token):
        """Of a part of a character its symbol in the vocabulary: decoded, all of them would be alike."""
        said = tokenizer.decode([token])
        return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in said else said

    for latent, logits in zip(shown, expected, strict=True):
        best, worst = logits.topk(10), (-logits).topk(10)
        assert [token for token, _ in latent["raises"]] == list(map(word, best.indices.tolist()))
        assert [token for token, _ in latent["lowers"]] == list(map(word, worst.indices.tolist()))
        assert [by for _, by in latent["raises"]] == pytest.approx(best.values.tolist(), rel=0.01)
    page = (run / "latents.html").read_text()
    assert page.count(">raises ") == page.count("and lowers ") == 2
    assert "its decoder row makes likelier" in page

    sae.train(
        config_of(tiny, tmp_path / "inward", reads="input"), report=False
    )  # what goes into a module is not written
    assert run_cli("latents", tmp_path / "inward").code == 0
    assert "raises" not in (tmp_path / "inward/latents.html").read_text()


def test_activations_of_another_module_are_told(tiny, run, tmp_path, caplog):
    source = SourceConfig.of_kind(tiny.section(module="transformer.h.0"))
    describe(run, [1], source=source, out=tmp_path / "other")
    assert "run was trained on transformer.h.1, but these are activations of transformer.h.0" in caplog.text
    caplog.clear()
    harvest_model(SourceConfig.of_kind(tiny.section()), tmp_path / "acts")
    describe(run, [1], source=sae.StoreSourceConfig(path=tmp_path / "acts"), out=tmp_path / "same")
    assert "trained on" not in caplog.text
