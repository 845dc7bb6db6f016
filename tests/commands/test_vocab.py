"""`optin vocab` from the command line, and what comes after it: budgets, evaluation, benchmarks."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import copy_of, opened, saved_model
from helpers.sentences import folder_of
from helpers.vocabularies import prose, whole_model

from optin_cli.artefacts.vocabulary import read_vocabulary


@pytest.fixture
def texts(tmp_path):
    """A CSV file with two columns of prose, and how alike they are."""
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sentence1", "sentence2", "label"])
        writer.writerows([text, text[::2], place % 2] for place, text in enumerate(prose()))
    return path


def test_what_it_prints_and_writes(texts, tmp_path):
    out = tmp_path / "small"
    said = run("vocab", whole_model("bert"), "--data", texts, "-o", out)
    assert said.stdout.split() == [str(out)]
    record = read_vocabulary(out)
    tokenizer = opened(whole_model("bert")).processor.tokenizer
    words = [one for text in prose() for half in (text, text[::2]) for one in tokenizer(half)["input_ids"]]
    counts = Counter(one for one in words if one not in tokenizer.all_special_ids)
    assert record.unseen == sum(count == 1 for count in counts.values()) / counts.total() > 0.01
    assert "too little text" in said.stderr
    for told in (f"{record.tokens:,}", f"{record.model['tokens']:,}", "100.000 %", "reading the text"):
        assert told in said.stderr
    found = json.loads(run("vocab", whole_model("bert"), "--data", texts, "-o", out, "--json").stdout)
    assert found["reused"] and found["tokens"] == record.tokens and found["bytes"] == 4 * found["params"]
    shown = run("inspect", out).stdout
    assert f"{record.tokens:,} of the {record.model['tokens']:,}" in shown
    assert json.loads(run("inspect", out, "--json").stdout)["vocabulary"]["covered"] == 1.0


def test_both_text_columns_are_counted(texts, tmp_path):
    for name, columns in (("one", "sentence1"), ("both", "sentence1,sentence2")):
        run("vocab", whole_model("bert"), "--data", texts, "--text", columns, "-o", tmp_path / name, "-q")
    one, both = (set(read_vocabulary(tmp_path / name).kept) for name in ("one", "both"))
    assert one < both


def test_targets_are_counted(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"text": a, "target": b}) + "\n" for a, b in [prose()[:2], prose()[2:4]])
    )
    run("vocab", whole_model("bart"), "--data", path, "-o", tmp_path / "m", "-q")
    tokenizer = opened(whole_model("bart")).processor.tokenizer
    wanted = {one for text in prose()[:4] for one in tokenizer(text)["input_ids"]}
    assert wanted <= set(read_vocabulary(tmp_path / "m").kept)


def test_whole_texts_are_counted_beyond_what_the_model_takes(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text\n" + " ".join(prose()).replace(",", " ").replace('"', " ") + "\n")
    run("vocab", whole_model("bert"), "--data", path, "-o", tmp_path / "m", "-q")
    tokenizer = opened(whole_model("bert")).processor.tokenizer
    ids = tokenizer(path.read_text().partition("\n")[2], verbose=False)["input_ids"]
    assert len(ids) > 500 and set(ids) <= set(read_vocabulary(tmp_path / "m").kept)


def test_outputs_that_are_there(texts, tmp_path):
    model, out = whole_model("bert"), tmp_path / "small"
    asked = ("vocab", model, "--data", texts, "-o", out)
    run(*asked, "-q")
    first = (out / "optin-vocab.json").read_bytes()
    error = run(*asked, "--coverage", 0.9, code=2).stderr
    assert "made with another coverage" in error and "--force" in error
    assert (out / "optin-vocab.json").read_bytes() == first
    assert "coverage was 1.0, is 0.9" in run(*asked, "--coverage", 0.9, "--update", "--explain").stderr
    assert read_vocabulary(out).covered < 1
    (out / "README.md").write_text("my notes")
    run(*asked, "--force", "-q")
    assert (out / "README.md").read_text() == "my notes"
    assert read_vocabulary(out).covered == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "not made by" in run("vocab", model, "--data", texts, "-o", mine, "--force", code=2).stderr
    assert "model being read" in run("vocab", out, "--data", texts, "-o", out, "--force", code=2).stderr


def test_wrong_calls(texts, tmp_path):
    model, out = whole_model("bert"), tmp_path / "small"

    def refused(*options, code=2, of=model):
        return run("vocab", of, "--data", texts, "-o", out, *options, code=code).stderr

    assert "--keep 3 would drop special tokens" in refused("--keep", 3)
    assert "--coverage 1.5: a share" in refused("--coverage", 1.5)
    assert "--coverage 0: a share" in refused("--coverage", 0)
    assert "--keep and --coverage both" in refused("--keep", 300, "--coverage", 0.5)
    assert "reads no text" in refused(of=saved_model("vit"), code=1)
    assert "no column 'nothing'" in refused("--text", "nothing")
    assert not out.exists()
    damaged = copy_of(model, tmp_path / "damaged")
    (damaged / "tokenizer.json").unlink()
    (damaged / "vocab.txt").unlink()
    assert "tokenizer" in refused(of=damaged, code=1)
    assert not list(tmp_path.glob(".small*"))


def test_a_damaged_record(texts, tmp_path):
    out = tmp_path / "small"
    run("vocab", whole_model("bert"), "--data", texts, "-o", out, "-q")
    record = json.loads((out / "optin-vocab.json").read_text())
    (out / "optin-vocab.json").write_text(json.dumps({**record, "kept": "all"}))
    assert "damaged record" in run("inspect", out, code=3).stderr


def test_nothing_is_left_of_a_run_that_is_interrupted(texts, tmp_path, monkeypatch):
    from optin_cli.vocabulary import reduce

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reduce, "write_vocabulary", interrupted)
    run("vocab", whole_model("bert"), "--data", texts, "-o", tmp_path / "small", code=130)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.csv"]


@pytest.mark.parametrize("budget", [pytest.param("--params", marks=pytest.mark.slow), "--memory"])
def test_budgets_count_the_smaller_embedding(budget, texts, tmp_path):
    out = tmp_path / "small"
    run("vocab", whole_model("bert"), "--data", texts, "-o", out, "-q")
    run("score", out, "--data", texts, "-o", tmp_path / "r.h5", *FAST, "-q")
    params = read_vocabulary(out).params
    asked = 0.9 if budget == "--params" else 0.9 * 4 * params / 2**20
    made = json.loads(
        run("select", tmp_path / "r.h5", budget, asked, "-o", tmp_path / "m.json", "--json").stdout
    )
    assert made["reached"]["dense_params"] == params
    assert 0.8 * params < made["reached"]["params"] <= 0.9 * params + 1
    run("apply", out, tmp_path / "m.json", "-o", tmp_path / "pruned", "--compensate", "none", "-q")
    module = opened(tmp_path / "pruned").module
    assert sum(p.numel() for p in module.parameters()) == made["reached"]["params"]
    assert module.config.vocab_size == read_vocabulary(out).tokens


def test_a_folder_of_sentence_transformers_stays_one(tmp_path):
    folder = folder_of(tmp_path / "st", {"pooling_mode_cls_token": True}, others=("Normalize",))
    data = tiny_text_csv(tmp_path / "data", rows=3)
    run("vocab", folder, "--data", data, "-o", tmp_path / "small", "-q")
    assert (tmp_path / "small" / "modules.json").read_bytes() == (folder / "modules.json").read_bytes()
    assert (tmp_path / "small" / "1_Pooling" / "config.json").is_file()
    found = json.loads(
        run(
            "eval", tmp_path / "small", "--baseline", folder, "--data", data, "--split", "train", "--json"
        ).stdout
    )
    assert found["fidelity"]["cosine"] == pytest.approx(100, abs=1e-4)


def test_a_baseline_reads_texts_by_its_own_tokenizer(texts, tmp_path):
    model, out = whole_model("bert"), tmp_path / "small"
    run("vocab", model, "--data", texts, "--coverage", 0.7, "-o", out, "-q")
    asked = ("--data", texts, "--split", "train", "--json")
    ours = json.loads(run("eval", out, "--baseline", model, *asked).stdout)
    alone = json.loads(run("eval", model, *asked).stdout)
    assert ours["baseline_metrics"] == alone["metrics"]
    assert ours["metrics"] == json.loads(run("eval", out, *asked).stdout)["metrics"]
    assert ours["fidelity"]["kl"] > 0
    run("vocab", model, "--data", texts, "-o", tmp_path / "all", "-q")
    same = json.loads(run("eval", tmp_path / "all", "--baseline", model, *asked).stdout)
    assert same["fidelity"]["agreement"] == 100 and abs(same["fidelity"]["kl"]) < 1e-9


def test_predictions_of_other_tokens_can_not_be_compared(texts, tmp_path):
    run("vocab", whole_model("gpt2"), "--data", texts, "--text", "sentence1", "-o", tmp_path / "small", "-q")
    asked = ("--data", texts, "--text", "sentence1", "--split", "train")
    error = run("eval", tmp_path / "small", "--baseline", whole_model("gpt2"), *asked, code=2).stderr
    assert "have different tokens" in error and "without --baseline" in error
    run("eval", tmp_path / "small", *asked)
    run("bench", tmp_path / "small", "--baseline", whole_model("gpt2"), "--seq-len", 8, "--batch-size", 1,
        "--repeats", 1, "--seconds", 0)  # fmt: skip


def test_a_model_of_tokens_for_each_word_needs_the_same_split(tmp_path):
    from helpers.evaluation import tagged

    model = saved_model("bert", "tagger")
    data = tagged(tmp_path)
    few = tmp_path / "few.csv"
    few.write_text("text\nthe cat\n")
    run("vocab", model, "--data", few, "--text", "text", "-o", tmp_path / "small", "-q")
    asked = ("eval", tmp_path / "small", "--baseline", model, "--data", data, "--split", "train")
    assert "different tokens" in run(*asked, code=2).stderr
