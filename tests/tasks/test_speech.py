"""Transcripts: written greedily, normalised, and counted against the right ones."""

from __future__ import annotations

import csv
import dataclasses
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.data import save_wav, sentences, sound, tiny_audio_folder
from helpers.evaluation import batches, other_model
from helpers.models import shared_model
from helpers.runs import examples, random_inputs
from hypothesis import given
from hypothesis import strategies as st

import optin_cli as optin
from optin_cli.errors import GateError, InputError, UsageError
from optin_cli.measure.evaluate import evaluate, gate
from optin_cli.tasks import metrics
from optin_cli.tasks.audio import SpeechRecognition

WORDS = st.lists(st.sampled_from(["a", "b", "cat", "dog"]), max_size=7)


def by_definition(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Levenshtein's recursion."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(first), len(second))


@examples(200)
@given(WORDS, WORDS)
def test_edit_distances_are_levenshteins(first, second):
    assert metrics.edit_distance(first, second) == by_definition(tuple(first), tuple(second))


def test_rates_are_of_all_words_together():
    """One word replaced, one left out and two added, on 6 words: not the mean of the rates of three texts."""
    texts = ["the cat sat", "on mat", "well yes yes it is"]
    wanted = ["the dog sat", "on the mat", "it is"]
    found = metrics.error_rates(texts, [*wanted[:2], "yes it is"])
    assert found["word_error_rate"] == pytest.approx(100 * (1 + 1 + 2) / (3 + 3 + 3))
    assert found["character_error_rate"] == pytest.approx(100 * (3 + 4 + 9) / (11 + 10 + 9))
    assert metrics.error_rates(["one two three"], ["four"])["word_error_rate"] == 300
    assert metrics.error_rates(["word"], [""]) == {}


# ---- normalising


def normalised(text: str, language: str | None, multilingual: bool = True, **table: dict[str, str]) -> str:
    tokenizer = SimpleNamespace(language=language, **table)
    module = SimpleNamespace(generation_config=SimpleNamespace(is_multilingual=multilingual))
    processor = SimpleNamespace(text=SimpleNamespace(tokenizer=tokenizer))
    seen = []
    task = SpeechRecognition()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            metrics, "error_rates", lambda texts, references: seen.extend([*texts, *references]) or {}
        )
        task.text_metrics(module, [text], [text], processor)
    assert seen[0] == seen[1]
    return seen[0]


@pytest.mark.parametrize(
    ("text", "language", "multilingual", "wanted"),
    [
        ("It's Twenty-One colours, [noise] OK?", "en", True, "it is 21 colors ok"),
        ("It's Twenty-One colours, [noise] OK?", "english", True, "it is 21 colors ok"),
        ("It's Twenty-One", None, False, "it is 21"),  # a model of English alone
        ("It's Twenty-One", None, True, "it s twenty one"),  # no language is known
        ("Fünf Äpfel, um zwölf!", "german", True, "fünf äpfel um zwölf"),
        ("你好。", "zh", True, "你 好"),
    ],
)
def test_transcripts_are_normalised_by_their_language(text, language, multilingual, wanted):
    table = {"english_spelling_normalizer": {"colours": "colors"}}
    assert normalised(text, language, multilingual, **table) == wanted


def test_english_is_normalised_without_its_table_of_spellings():
    assert normalised("Twenty colours", "en", english_spelling_normalizer=None) == "20 colours"


# ---- writing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_audio_folder(tmp_path_factory.mktemp("speech"), 7, transcripts=True)


def opened_batches(model, folder, size=3):
    return batches(model, folder / "train.csv", size, reader=model.task.reader)


@torch.no_grad()
def step_by_step(model, sound: torch.Tensor) -> list[int]:
    """The likeliest token after those before it, each from a forward of all of them, up to the end of the text."""
    config = model.module.config
    ids = [config.decoder_start_token_id]
    while len(ids) < config.max_target_positions and ids[-1] != config.eos_token_id:
        logits = model.module(
            input_features=sound, decoder_input_ids=torch.tensor([ids]), use_cache=False
        ).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids


def test_a_transcript_is_the_likeliest_token_again_and_again(folder):
    """In batches and with caches as one by one without."""
    model = shared_model("whisper")
    found = {}
    for batch in opened_batches(model, folder):
        written = model.task.write(model.module, batch.inputs, model.processor)
        found |= zip(batch.example_ids, written, strict=True)
    data = opened_batches(model, folder, 1)
    tokenizer = model.processor.text.tokenizer
    for batch in data:
        ids = step_by_step(model, batch.inputs["input_features"])
        assert found[batch.example_ids[0]] == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(found.values())) > 1


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        ({"is_multilingual": True, "lang_to_id": {}}, {"language": "german", "task": "transcribe"}),
        ({"is_multilingual": False}, {}),
        ({}, {}),
    ],
)
def test_the_tokenizers_language_is_asked_for(known, asked):
    given = {}
    module = SimpleNamespace(
        generation_config=SimpleNamespace(**known), generate=lambda **options: given.update(options) or [[1]]
    )
    tokenizer = SimpleNamespace(
        language="german", task="transcribe", batch_decode=lambda ids, skip_special_tokens: ["ja"]
    )
    processor = SimpleNamespace(text=SimpleNamespace(tokenizer=tokenizer))
    inputs = {"input_features": 1, "decoder_input_ids": 2, "decoder_attention_mask": 3}
    assert SpeechRecognition().write(module, inputs, processor) == ["ja"]
    assert given == {"input_features": 1, "do_sample": False, "num_beams": 1, **asked}


def test_a_language_that_a_model_does_not_know_is_told(folder):
    model = shared_model("whisper")
    module = SimpleNamespace(generation_config=model.module.generation_config, generate=refusing)
    batch = opened_batches(model, folder)[0]
    with pytest.raises(InputError, match="does not write transcripts: no klingon"):
        model.task.write(module, batch.inputs, model.processor)


def refusing(**_):
    raise ValueError("no klingon\nand more")


# ---- evaluating


def transcripts(folder, texts) -> None:
    """`folder` with recordings, and `texts` as what is said in them."""
    with (folder / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("audio", "text"), *((f"{i}.wav", text) for i, text in enumerate(texts))]
        )


@pytest.fixture(scope="module")
def own_words(tmp_path_factory):
    """Recordings with what the dense model takes them for."""
    folder, model = tmp_path_factory.mktemp("own"), shared_model("whisper")
    for i in range(6):
        save_wav(folder / f"{i}.wav", sound(0.5, 16000, 220 * (1 + i), i), 16000)
    transcripts(folder, sentences(6))
    texts = {}
    for batch in opened_batches(model, folder):
        texts |= zip(
            batch.example_ids, model.task.write(model.module, batch.inputs, model.processor), strict=True
        )
    transcripts(folder, [texts[i] for i in range(6)])
    return folder


def test_a_model_that_is_right_has_no_errors_and_another_loses_them(own_words):
    dense, other = shared_model("whisper"), other_model("whisper")
    found = evaluate(other, opened_batches(dense, own_words), dense)
    rates = ("word_error_rate", "character_error_rate")
    assert list(found.metrics) == [*rates, "perplexity", "accuracy"]
    assert [found.baseline_metrics[rate] for rate in rates] == [0, 0]
    assert found.main == "word_error_rate"
    assert found.drop == found.metrics["word_error_rate"] > 0
    assert {rate: found.fidelity[rate] for rate in rates} == {rate: found.metrics[rate] for rate in rates}
    with pytest.raises(GateError, match=r"word_error_rate rises by \d+\.\d+ points, more than the 1 allowed"):
        gate(found, 1)
    assert evaluate(dense, opened_batches(dense, own_words)).metrics == found.baseline_metrics


def test_the_encoder_runs_once_for_scores_and_transcripts(own_words):
    model, runs = shared_model("whisper"), []
    with model.module.get_encoder().register_forward_hook(lambda *_: runs.append(1)):
        found = evaluate(model, opened_batches(model, own_words))
    assert len(runs) == 2  # batches of three
    assert found.metrics["word_error_rate"] == 0


def test_batches_change_nothing(own_words):
    model = other_model("whisper")
    one, many = (evaluate(model, opened_batches(model, own_words, size)).metrics for size in (1, 6))
    assert one == pytest.approx(many, rel=1e-5)


def test_what_has_one_forward_alone_is_measured_without_transcripts(own_words):
    """An exported file."""
    model = shared_model("whisper")
    exported = dataclasses.replace(model, runtime=model.module)
    found = evaluate(exported, opened_batches(model, own_words), model)
    assert found.metrics.keys() == found.baseline_metrics.keys() == {"perplexity", "accuracy"}
    assert (found.main, found.drop) == ("perplexity", pytest.approx(0))
    assert found.fidelity.keys() == {"agreement", "kl"}


def test_batches_of_tensors_are_compared_with_the_dense_model_alone():
    model = shared_model("whisper")
    made = [random_inputs(model, seed=seed) for seed in range(2)]
    assert optin.evaluate(other_model("whisper"), made, baseline=model).fidelity.keys() == {"agreement", "kl"}
    with pytest.raises(UsageError, match="nothing to measure"):
        optin.evaluate(model, made)


def test_rates_are_there_in_python(own_words):
    found = optin.evaluate(shared_model("whisper"), str(own_words / "train.csv"), split="train")
    assert found.metrics["word_error_rate"] == 0
    assert np.isfinite(found.metrics["perplexity"])
