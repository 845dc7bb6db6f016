"""Models with fewer tokens: outputs are those before, with transformers alone, and nothing is left of other tokens."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import DECODERS, ENCODER_DECODERS, MORE_TEXT, TEXT_FAMILIES
from helpers.models import copy_of, opened, saved_model
from helpers.vocabularies import END, MODELS, UNUSED, prose, whole_model
from safetensors.torch import load_file

import optin_cli as optin
from optin_cli.artefacts.vocabulary import read_vocabulary
from optin_cli.errors import InputError, OptinError, UsageError
from optin_cli.tasks.language import NextToken


def stock(folder, task):
    """(model, tokenizer) as anybody opens them."""
    import transformers

    auto = getattr(transformers, task.auto_class)
    return auto.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def logits(model, tokenizer, texts):
    """The first tensor of the outputs, [texts, tokens, features]."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=24)
    inputs.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": value for name, value in dict(inputs).items()}
    with torch.inference_mode():
        return model(**inputs)[0], inputs


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_before_with_transformers_alone(name, tmp_path):
    dense = opened(whole_model(name))
    small = optin.vocab(dense, prose(), output=tmp_path / "small")
    kept, report = small.report.kept, small.report
    assert report.dense_tokens - report.tokens > UNUSED and report.covered == 1.0
    (ours, our_tokens), (theirs, their_tokens) = (
        stock(folder, dense.task) for folder in (tmp_path / "small", whole_model(name))
    )
    found, inputs = logits(ours, our_tokens, prose())
    expected, before = logits(theirs, their_tokens, prose())
    assert torch.equal(torch.tensor(kept)[inputs["input_ids"]], before["input_ids"])
    if isinstance(dense.task, NextToken):
        expected = expected[..., kept]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert report.deviation <= 1e-6
    assert sum(p.numel() for p in ours.parameters()) == report.params
    for rows in {*our_tokens.get_vocab().values()}:
        assert rows < report.tokens
    assert [t.shape for t in opened(tmp_path / "small").module.state_dict().values()] == [
        t.shape for t in small.module.state_dict().values()
    ]


@pytest.mark.parametrize("name", [*TEXT_FAMILIES, *MORE_TEXT, *DECODERS, *ENCODER_DECODERS])
def test_every_family_of_text_can_lose_tokens(name, tmp_path):
    texts = ["the cat runs", "a dog sits on the tree"]
    report = optin.vocab(opened(saved_model(name)), texts, output=tmp_path / "small").report
    assert report.tokens < report.dense_tokens and report.covered == 1.0
    assert report.deviation <= 1e-6
    assert f"{report.tokens} of {report.dense_tokens} tokens" in repr(report)


@pytest.mark.parametrize("name", ["bert-masked", "gpt2", "llama", "t5-gated", "bart", "bert-to-bert"])
def test_every_table_of_tokens_is_cut_to_the_kept_rows(name, tmp_path):
    small = optin.vocab(opened(whole_model(name)), prose(), output=tmp_path / "small")
    kept, whole = small.report.kept, small.report.dense_tokens
    before, after = (load_file(f / "model.safetensors") for f in (whole_model(name), tmp_path / "small"))
    assert before.keys() == after.keys()
    tables = 0
    for key, tensor in before.items():
        dims = [dim for dim, size in enumerate(tensor.shape) if size == whole]
        for dim in dims:
            tensor = tensor.index_select(dim, torch.tensor(kept))
        tables += bool(dims)
        assert torch.equal(after[key], tensor), key
    assert tables


def test_ids_of_configs_are_the_new_ones(tmp_path):
    folder = copy_of(whole_model("bart"), tmp_path / "whole")
    dense = opened(folder)
    tokenizer = dense.processor.tokenizer
    end, used = tokenizer.convert_tokens_to_ids(END), tokenizer(prose()[0])["input_ids"][1]
    kept = optin.vocab(dense, prose()).report.kept
    gone = next(one for one in range(end) if one not in kept)
    generation = {
        "eos_token_id": [end, 3], "forced_eos_token_id": end, "suppress_tokens": [gone, used, 3],
        "begin_suppress_tokens": [gone], "bad_words_ids": [[used, gone], [used, 3]],
        "sequence_bias": [[[gone], 1.0], [[used], -2.0]], "pad_token_id": 0,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))
    optin.vocab(opened(folder), prose(), output=tmp_path / "small")
    kept = read_vocabulary(tmp_path / "small").kept
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["vocab_size"] == len(kept)
    assert config["eos_token_id"] == config["decoder_start_token_id"] == kept.index(end) == len(kept) - 1
    found = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert found["eos_token_id"] == [kept.index(end), kept.index(3)]
    assert found["forced_eos_token_id"] == kept.index(end)
    assert found["suppress_tokens"] == [kept.index(used), kept.index(3)]
    assert not found.get("begin_suppress_tokens")
    assert found["bad_words_ids"] == [[kept.index(used), kept.index(3)]]
    assert found["sequence_bias"] == [[[kept.index(used)], -2.0]]


def test_older_files_of_the_tokenizer_say_the_same(tmp_path):
    small = optin.vocab(opened(whole_model("bert")), prose(), output=tmp_path / "small")
    lines = (tmp_path / "small" / "vocab.txt").read_text().splitlines()
    vocabulary = small.processor.tokenizer.get_vocab()
    assert lines == sorted(vocabulary, key=vocabulary.__getitem__)[: len(lines)]
    assert set(vocabulary) - set(lines) == {END}


def test_fewer_tokens_lengthen_texts_and_leave_them_readable(tmp_path):
    dense = opened(whole_model("roberta"))
    whole = optin.vocab(dense, prose())
    some = optin.vocab(dense, prose(), coverage=0.9)
    few = optin.vocab(dense, prose(), keep=whole.report.record.always + 30)
    assert few.report.tokens == whole.report.record.always + 30
    assert 0.9 <= some.report.covered < 1
    assert few.report.covered < some.report.covered or few.report.tokens >= some.report.tokens
    lengths = []
    for model in (whole, some, few):
        tokenizer = model.processor.tokenizer
        ids = tokenizer(prose()[0])["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == prose()[0]
        lengths.append(len(ids))
    assert lengths[0] == len(dense.processor.tokenizer(prose()[0])["input_ids"]) < min(lengths[1:])


def test_coverage_takes_the_fewest_tokens_of_wordpiece():
    """Against every prefix of the sorted counts."""
    from collections import Counter

    dense = opened(whole_model("bert"))
    report = optin.vocab(dense, prose(), coverage=0.95).report
    tokenizer = dense.processor.tokenizer
    counts = Counter(
        one
        for text in prose()
        for one in tokenizer(text, add_special_tokens=False)["input_ids"]
        if one != tokenizer.unk_token_id
    )
    assert report.record.counted == counts.total()
    always = set(optin.vocab(dense, prose(), keep=report.record.always).report.kept)
    rest = sorted((count for one, count in counts.items() if one not in always), reverse=True)
    had = sum(count for one, count in counts.items() if one in always)
    fewest = next(n for n in range(len(rest) + 1) if had + sum(rest[:n]) >= 0.95 * counts.total())
    assert report.tokens == report.record.always + fewest


def test_room_that_the_data_does_not_need_is_for_the_first_tokens():
    dense = opened(whole_model("gpt2"))
    some = optin.vocab(dense, prose(2)).report
    more = optin.vocab(dense, prose(2), keep=some.tokens + 20).report
    assert more.tokens == some.tokens + 20 and set(some.kept) < set(more.kept)
    added = sorted(set(more.kept) - set(some.kept))
    left = sorted(set(range(some.dense_tokens - UNUSED)) - set(some.kept))
    assert added[:5] == left[:5]
    everything = optin.vocab(dense, prose(2), keep=10_000).report
    assert everything.tokens == some.dense_tokens - UNUSED


def test_a_smaller_model_is_the_callers_to_prune_and_save(tmp_path):
    dense = opened(whole_model("bert"))
    before = dense.module.get_input_embeddings().weight.clone()
    small = optin.vocab(dense, prose())
    assert torch.equal(dense.module.get_input_embeddings().weight, before)
    pruned = optin.prune(small, prose(), flops=0.6, samples=12, compensate="none")
    optin.save(pruned, tmp_path / "pruned")
    again = opened(tmp_path / "pruned")
    assert again.processor.tokenizer.get_vocab() == small.processor.tokenizer.get_vocab()
    assert again.record.dense["params"] == small.report.params
    assert not (tmp_path / "pruned" / "vocab.txt").exists()  # that of the whole vocabulary


def test_a_module_in_memory_and_batches_of_ids(tmp_path):
    from transformers import AutoTokenizer

    dense = opened(whole_model("bert"))
    tokenizer = AutoTokenizer.from_pretrained(whole_model("bert"))
    texts = [text[:80] for text in prose()]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    model = optin.open_model(dense.module, processor=tokenizer)
    of_ids, of_texts = optin.vocab(model, [batch]), optin.vocab(model, texts)
    assert of_ids.report.kept == of_texts.report.kept
    assert not optin.vocab(model, texts, output=tmp_path / "m").report.reused
    assert optin.vocab(model, texts, output=tmp_path / "m").report.reused


@pytest.mark.parametrize("uniform", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pruned_directory_loses_tokens_and_opens_as_before(uniform, tmp_path):
    from transformers import AutoModelForSequenceClassification as Auto

    dense = opened(whole_model("bert"))
    pruned = optin.prune(
        dense, prose(), flops=0.8, samples=12, compensate="none", uniform=uniform, output=tmp_path / "pruned"
    )
    small = optin.vocab(tmp_path / "pruned", prose(), output=tmp_path / "small")
    assert small.record.kept == pruned.record.kept
    assert small.record.history[-1]["params"] == small.report.params < pruned.report.params
    trust = {} if uniform else {"trust_remote_code": True}
    ours, theirs = (Auto.from_pretrained(tmp_path / one, **trust) for one in ("small", "pruned"))
    assert ours.config.vocab_size == small.report.tokens
    kept = torch.tensor(small.report.kept[5:25])[None]
    new = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert (ours(new)[0] - theirs(kept)[0]).abs().max() <= 1e-6
    twice = optin.prune(
        tmp_path / "small", prose(), flops=0.7, samples=12, compensate="none", output=tmp_path / "twice"
    )
    assert twice.module.config.vocab_size == small.report.tokens


# ---- refusals ----


def test_special_tokens_can_not_be_dropped():
    with pytest.raises(UsageError, match="would drop special tokens") as error:
        optin.vocab(opened(whole_model("bert")), prose(), keep=4)
    least = int(error.value.hint.split()[1])
    assert optin.vocab(opened(whole_model("bert")), prose(), keep=least).report.tokens == least


@pytest.mark.parametrize(
    "wrong", [{"keep": 0}, {"coverage": 0.0}, {"coverage": 1.1}, {"keep": 9, "coverage": 0.5}]
)
def test_settings_that_can_not_be(wrong):
    with pytest.raises(UsageError):
        optin.vocab(opened(whole_model("bert")), prose(), **wrong)


def test_a_model_that_reads_more_from_ids_than_embeddings_is_refused():
    """The check of outputs can fail: this model knows a token by its number."""
    dense = opened(whole_model("bert"))
    words = dense.module.get_input_embeddings()
    large = dense.module.config.vocab_size - UNUSED - 1

    def by_number(module, args, output):
        return torch.where(args[0][..., None] >= large - 200, output.flip(-1), output)

    words.register_forward_hook(by_number)
    with pytest.raises(OptinError, match="nothing was written"):
        optin.vocab(dense, prose())


def test_models_without_one_vocabulary_are_refused(tmp_path):
    from helpers.models import shared_model

    for name in ("vit", "whisper"):
        with pytest.raises(InputError, match="reads no text"):
            optin.vocab(shared_model(name), prose())


def test_two_vocabularies_of_encoder_and_decoder_are_refused():
    dense = opened(whole_model("bert-to-bert"))
    dense.module.config.decoder.vocab_size += 1
    with pytest.raises(InputError, match="vocabularies of their own"):
        optin.vocab(dense, prose())


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path):
    folder = copy_of(whole_model("bert"), tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text())
    used = opened(folder).processor.tokenizer(prose()[0])["input_ids"][1]
    token = next(token for token, one in content["model"]["vocab"].items() if one == used)
    content["model"]["vocab"][token] = 10_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="knows"):
        optin.vocab(opened(folder), prose())
