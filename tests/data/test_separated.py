"""Tables of text as people write them: separators, headers, encodings; and rows without text."""

from __future__ import annotations

import json
import logging

import pytest
from helpers.cli import run
from helpers.data import sentences, tiny_text_csv
from helpers.models import saved_model

from optin_cli.data.examples import sample
from optin_cli.data.readers import ROWS, RUNNING_TEXT, SIDES, TARGETS
from optin_cli.data.sources import DataSpec, open_split
from optin_cli.errors import InputError

TEXTS = ["Das Wetter, sagt man, ist schön", "Es regnet", 'Er sagt "nein"', "Kalt und nass"] * 3


def written(path, separator, texts=TEXTS, header="text{}label", ending="\r\n", encoding="utf-8-sig"):
    quoted = ['"' + text.replace('"', '""') + '"' if {separator, '"'} & set(text) else text for text in texts]
    rows = [header.format(separator), *(f"{text}{separator}{i % 2}" for i, text in enumerate(quoted))]
    path.write_bytes(ending.join([*filter(None, rows), ""]).encode(encoding))
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV"])
def test_whatever_separates_the_columns_they_are_the_same(suffix, separator, stream, tmp_path):
    data = DataSpec(str(written(tmp_path / f"t{suffix}", separator)), stream=stream)
    found = sample(data, "text", None, 0)
    assert found.columns.text == ("text",) and found.columns.label == "label"
    assert found.rows["text"][:] == TEXTS
    assert found.rows["label"][:] == [i % 2 for i in range(len(TEXTS))]


def test_another_separator_than_the_suffix_says_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "optin"):
        open_split(DataSpec(str(written(tmp_path / "t.csv", ";"))))
        assert "t.csv is separated by semicolons" in caplog.text
        caplog.clear()
        open_split(DataSpec(str(written(tmp_path / "u.csv", ","))))
        assert not caplog.text


@pytest.mark.parametrize("text", ["a; b", "one; two; three", "x | y"])
def test_a_single_column_with_other_separators_in_its_texts_is_one_column(text, tmp_path):
    (tmp_path / "t.csv").write_text("text\n" + f"{text}\n" * 5)
    assert open_split(DataSpec(str(tmp_path / "t.csv")))["text"][:] == [text] * 5


def test_commas_that_no_quotes_keep_are_refused(tmp_path):
    """Readers would take the first field for an index and the second for the text."""
    (tmp_path / "t.csv").write_text("text\nwell, it rains\nno, it does not\n")
    with pytest.raises(InputError, match="2 fields separated by commas, and its header has 1"):
        open_split(DataSpec(str(tmp_path / "t.csv")))


HEADERLESS = {
    "a number": "it is cold,1\nit is hot,0\nso so,1\n",
    "a class": "it is cold,bad\nit is hot,good\nso so,bad\n",
    "sentences": "what a dull film it was\na film that is very good\nthe cat sits on the roof\n",
    "semicolons": "it is cold;1\nit is hot;0\n",
}


@pytest.mark.parametrize("case", HEADERLESS)
def test_a_file_without_a_header_is_refused(case, tmp_path):
    (tmp_path / "t.csv").write_text(HEADERLESS[case])
    with pytest.raises(InputError, match=f"no header: its first line is '{HEADERLESS[case][:5]}"):
        open_split(DataSpec(str(tmp_path / "t.csv")))


HEADERS = {
    "usual names": "text,2\nit is cold,1\nit is hot,0\n",
    "numbers of pandas": "0,1\nit is cold,1\nit is hot,0\n",
    "an index without a name": ",body,stars\n0,it is cold,1\n1,it is hot,0\n",
    "a short name": "comment\nit is very cold today\nit is very hot today\n",
    "no rows": "it is cold,1\n",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_taken_for_one(case, tmp_path):
    (tmp_path / "t.csv").write_text(HEADERS[case])
    try:
        rows = open_split(DataSpec(str(tmp_path / "t.csv")))
    except InputError as error:
        assert case == "no rows" and "is empty" in error.what
    else:
        assert len(rows) == 2


def test_a_question_is_a_name_where_the_user_says_so(tmp_path):
    question = "How do you like the film"
    (tmp_path / "t.csv").write_text(f"{question}\nI like it very much\nit was quite dull indeed\n")
    with pytest.raises(InputError, match="no header"):
        sample(DataSpec(str(tmp_path / "t.csv")), "text", None, 0)
    assert sample(DataSpec(str(tmp_path / "t.csv"), text=(question,)), "text", None, 0).total == 2


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".jsonl", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_another_encoding_says_how_to_convert(encoding, suffix, tmp_path):
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
        path.write_bytes("\n".join(lines).encode(encoding))
    else:
        written(path, "\t" if suffix == ".tsv" else ",", encoding=encoding)
    with pytest.raises(InputError, match="not UTF-8") as caught:
        open_split(DataSpec(str(path)))
    wanted = {"cp1252": "WINDOWS-1252", "utf-16-le": "UTF-16LE"}.get(encoding, "UTF-16")
    assert f"iconv -f {wanted} -t UTF-8 t{suffix}" in caught.value.hint


def test_a_letter_of_another_encoding_far_down_is_found(tmp_path):
    written(tmp_path / "t.csv", ",", ["it rains"] * 20000 + ["schön"], ending="\n", encoding="cp1252")
    with pytest.raises(InputError, match="line 20002 is not UTF-8"):
        open_split(DataSpec(str(tmp_path / "t.csv")))


# rows without text


def blank_rows(tmp_path, count=60, every=5):
    texts = sentences(count)
    rows = [
        {"sentence": ("", None, "  ")[i % 3] if i % every == 0 else texts[i], "label": i % 2}
        for i in range(count)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "t.jsonl", [i for i in range(count) if i % every]


@pytest.mark.parametrize("stream", [False, True])
def test_rows_without_text_are_left_out_and_counted(stream, tmp_path, caplog):
    path, sound = blank_rows(tmp_path)
    found = sample(DataSpec(str(path), stream=stream), "text", None, 0)
    assert found.row_ids == sound
    assert "12 of 60 rows" in caplog.text and "have no text in 'sentence' and are left out" in caplog.text
    assert (
        sample(DataSpec(str(path)), "text", None, 0, row_ids=found.row_ids).fingerprint == found.fingerprint
    )


@pytest.mark.parametrize("stream", [False, True])
def test_others_are_drawn_in_their_place(stream, tmp_path, caplog):
    path, sound = blank_rows(tmp_path)
    found = [sample(DataSpec(str(path), stream=stream), "text", 20, 3) for _ in range(2)]
    assert found[0].row_ids == found[1].row_ids == sorted(found[0].row_ids)
    assert len(set(found[0].row_ids)) == 20 and set(found[0].row_ids) <= set(sound)
    assert "others taken in their place" in caplog.text


def test_a_sample_without_blank_rows_is_the_one_it_always_was(tmp_path, caplog):
    from optin_cli.data.rows import draw

    path = tiny_text_csv(tmp_path)
    assert sample(DataSpec(str(path)), "text", 20, 3).row_ids == draw(60, 20, 3)
    assert not caplog.text


def test_a_column_without_any_text_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("sentence,label\n" + ",1\n,0\n" * 20)
    with pytest.raises(InputError, match=r"none of 40 rows of .* has text in 'sentence'"):
        sample(DataSpec(str(tmp_path / "t.csv")), "text", None, 0)


@pytest.mark.parametrize(
    ("reader", "left"),
    [(ROWS, [0, 1]), (SIDES, [0]), (TARGETS, [0]), (RUNNING_TEXT, [0, 1, 2])],
    ids=["a pair is one text", "each side is one", "a target is needed", "a blank line is text"],
)
def test_what_lacks_text_is_the_readers_matter(reader, left, tmp_path):
    rows = [{"text1": "a", "text2": "b"}, {"text1": "a", "text2": ""}, {"text1": None, "text2": " "}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(str(tmp_path / "t.jsonl"))
    assert sample(data, "text", None, 0, reader=reader).row_ids == left


def test_what_is_taken_for_the_text_is_said_unless_quiet(tmp_path):
    data = tiny_text_csv(tmp_path, pairs=False)
    first = open_split(DataSpec(str(data)))["sentence"][0]
    said = f"reading the text from 'sentence' ('{first[:40]}"
    asked = [
        "score",
        saved_model("bert"),
        "--data",
        data,
        "-o",
        tmp_path / "r.h5",
        "--samples",
        60,
        "--dry-run",
    ]
    assert said in run(*asked).stderr
    assert "reading" not in run(*asked, "-q").stderr
    measured = run("eval", saved_model("bert"), "--data", data, "--split", "train", "--samples", 60)
    assert said in measured.stderr and "the label from 'label'" in measured.stderr
    assert "reading" not in measured.stdout
