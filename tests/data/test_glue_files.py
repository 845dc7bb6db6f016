"""GLUE's own TSV files, as its download lays them out: the columns, classes and numbers of the hub's data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.data import sentences

from optin_cli.data import glue
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec, open_split, open_stream
from optin_cli.errors import InputError
from optin_cli.measure.evaluate import evaluate

A, B = 'a "quoted word', "it's NA, \\N and 5'10\""
"""Texts that a reader of CSV would take apart."""

# folder -> (file of the validation set, its lines, the hub's rows); headers as in GLUE's zip files
MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label"
)
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
FILES: dict[str, tuple[str, list[str], dict[str, list]]] = {
    "CoLA": (
        "dev.tsv",
        [f"gj04\t1\t\t{A}", f"gj04\t0\t*\t{B}"],
        {"sentence": [A, B], "label": [1, 0]},
    ),
    "SST-2": (
        "dev.tsv",
        ["sentence\tlabel", f"{A} \t0", f"{B} \t1"],
        {"sentence": [f"{A} ", f"{B} "], "label": [0, 1]},
    ),
    "MRPC": (
        "dev.tsv",
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", f"1\t12\t13\t{A}\t{B}", f"0\t14\t15\t{B}\t{A}"],
        {"sentence1": [A, B], "sentence2": [B, A], "label": [1, 0]},
    ),
    "QQP": (
        "dev.tsv",
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", f"1\t2\t3\t{A}\t{B}\t0", f"4\t5\t6\t{B}\t{A}\t1"],
        {"question1": [A, B], "question2": [B, A], "label": [0, 1]},
    ),
    "STS-B": (
        "dev.tsv",
        [STSB, f"0\tnews\tf\t2012\t1\tnone\tnone\t{A}\t{B}\t3.8", f"1\tnews\tf\t2012\t2\tn\tn\t{B}\t{A}\t5.000"],
        {"sentence1": [A, B], "sentence2": [B, A], "label": [np.float32(3.8), 5.0]},
    ),
    "MNLI": (
        "dev_matched.tsv",
        [
            MNLI,
            f"0\t1\t2\tx\t(p)\t(p)\t(q)\t(q)\t{A}\t{B}\tneutral\tneutral\tneutral\tneutral\tneutral\tcontradiction",
            f"1\t1\t2\tx\t(p)\t(p)\t(q)\t(q)\t{B}\t{A}\tneutral\tneutral\tneutral\tneutral\tneutral\tentailment",
        ],
        {"premise": [A, B], "hypothesis": [B, A], "label": [2, 0]},
    ),
    "QNLI": (
        "dev.tsv",
        ["index\tquestion\tsentence\tlabel", f"0\t{A}\t{B}\tentailment", f"1\t{B}\t{A}\tnot_entailment"],
        {"question": [A, B], "sentence": [B, A], "label": [0, 1]},
    ),
    "RTE": (
        "dev.tsv",
        ["index\tsentence1\tsentence2\tlabel", f"0\t{A}\t{B}\tnot_entailment", f"1\t{B}\t{A}\tentailment"],
        {"sentence1": [A, B], "sentence2": [B, A], "label": [1, 0]},
    ),
    "WNLI": (
        "dev.tsv",
        ["index\tsentence1\tsentence2\tlabel", f"0\t{A}\t{B}\t1", f"1\t{B}\t{A}\t0"],
        {"sentence1": [A, B], "sentence2": [B, A], "label": [1, 0]},
    ),
}  # fmt: skip
CLASSES = {  # of the hub's data set
    "CoLA": ["unacceptable", "acceptable"],
    "SST-2": ["negative", "positive"],
    "MRPC": ["not_equivalent", "equivalent"],
    "QQP": ["not_duplicate", "duplicate"],
    "MNLI": ["entailment", "neutral", "contradiction"],
    "QNLI": ["entailment", "not_entailment"],
    "RTE": ["entailment", "not_entailment"],
    "WNLI": ["not_entailment", "entailment"],
}


def write(root: Path, name: str, lines: list[str] | None = None, file: str | None = None) -> Path:
    folder = root / "glue_data" / name
    folder.mkdir(parents=True, exist_ok=True)
    default, content, _ = FILES[name]
    (folder / (file or default)).write_text("\n".join(lines or content) + "\n", encoding="utf-8", newline="")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_task_as_the_hub_has_it(name, tmp_path):
    folder = write(tmp_path, name)
    found = open_split(DataSpec(str(folder), "validation"))
    assert found.to_dict() == FILES[name][2]
    label = found.features["label"]
    assert getattr(label, "names", None) == CLASSES.get(name)
    columns = sample(DataSpec(str(folder), "validation"), "text", None, 0).columns
    assert columns.text == tuple(FILES[name][2])[:-1] and columns.label == "label"
    assert glue.glue_task(str(folder), None) is glue.TASKS[name.lower().replace("-", "")]


def test_all_tasks_have_a_test():
    assert {name.lower().replace("-", "") for name in FILES} == set(glue.TASKS)


@pytest.mark.parametrize(
    ("split", "rows"), [("train", 4), ("validation", 2), ("dev", 2), ("dev_mismatched", 3), ("mismatched", 3)]
)
def test_splits_by_either_name(split, rows, tmp_path):
    head, *lines = FILES["MNLI"][1]
    folder = write(tmp_path, "MNLI")
    write(tmp_path, "MNLI", [head, *lines, *lines], "train.tsv")
    write(tmp_path, "MNLI", [head, *lines, lines[0]], "dev_mismatched.tsv")
    (folder / "original").mkdir()  # what GLUE's zip files hold beside
    (folder / "original" / "train.tsv").write_text("nothing of use\n")
    assert len(open_split(DataSpec(str(folder), split))) == rows


def test_the_labels_of_a_test_split_are_hidden(tmp_path):
    folder = write(tmp_path, "CoLA", ["index\tsentence", f"0\t{A}", f"1\t{B}"], "test.tsv")
    found = open_split(DataSpec(str(folder), "test"))
    assert found.to_dict() == {"sentence": [A, B], "label": [-1, -1]}


def test_rows_that_lack_something_are_left_out_and_told(tmp_path, caplog):
    lines = FILES["QQP"][1]
    broken = [*lines, "7\t8\t9\thalf a row", f"7\t8\t9\t{A}\t{B}\t", f"7\t8\t9\t\t{B}\t1", ""]
    found = open_split(DataSpec(str(write(tmp_path, "QQP", broken)), "validation"))
    assert found["label"][:] == [0, 1, 1] and found["question1"][:] == [A, B, ""]
    assert "2 rows without a text or a label" in caplog.text


def test_lines_end_where_windows_ends_them(tmp_path):
    folder = write(tmp_path, "RTE", [f"{line}\r" for line in FILES["RTE"][1]])
    assert open_split(DataSpec(str(folder), "validation")).to_dict() == FILES["RTE"][2]


def test_a_label_that_the_task_lacks_is_named(tmp_path):
    folder = write(tmp_path, "RTE", [*FILES["RTE"][1], f"3\t{A}\t{B}\tneutral"])
    with pytest.raises(InputError, match="label 'neutral'; the task has entailment, not_entailment"):
        open_split(DataSpec(str(folder), "validation"))


def test_files_with_columns_of_their_own_are_read_as_any_table(tmp_path):
    lines = ["text\tlabel", "good\t1", "bad\t0"]
    folder = write(tmp_path, "CoLA", lines, "train.tsv")
    assert open_split(DataSpec(str(folder), "train")).to_dict() == {"text": ["good", "bad"], "label": [1, 0]}


def test_a_stream_gives_the_same_rows(tmp_path):
    folder = write(tmp_path, "CoLA")
    rows = list(open_stream(DataSpec(str(folder), "validation", stream=True)))
    assert [row["sentence"] for row in rows] == [A, B]


def test_eval_reports_what_glue_reports(tmp_path):
    from helpers.models import shared_model
    from sklearn.metrics import matthews_corrcoef

    texts, truth = sentences(16, 3), np.random.default_rng(2).integers(0, 2, 16)
    folder = write(tmp_path, "CoLA", [f"gj04\t{y}\t\t{text}" for text, y in zip(texts, truth, strict=True)])
    model = shared_model("bert")
    found = sample(DataSpec(str(folder), "validation"), "text", None, 0, reader=model.task.reader)
    result = evaluate(model, Batches(found, model.processor, 8))
    guess = [
        int(model.module(**model.processor.tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts
    ]
    assert result.main == "matthews"
    assert result.metrics["matthews"] == pytest.approx(100 * matthews_corrcoef(truth, guess))
