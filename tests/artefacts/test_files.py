"""Digests, JSON and writes that leave either the whole file or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts import kinds
from optin_cli.artefacts.files import (
    check_output,
    digest_bytes,
    digest_files,
    digest_json,
    read_json,
    to_json,
)
from optin_cli.errors import ArtefactError, UsageError

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


# digests


def test_the_digest_of_bytes_is_sha_256():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_bytes() == digest_bytes(b"") == empty
    assert digest_bytes(b"a", b"b") == digest_bytes(b"ab") != empty


@examples(50)
@given(data=st.dictionaries(st.text(max_size=5), plain, min_size=2, max_size=5))
def test_the_digest_of_json_does_not_depend_on_the_order_of_keys(data):
    turned = dict(reversed(data.items()))
    assert digest_json(turned) == digest_json(data)


@examples(100)
@given(one=plain, other=plain)
def test_different_data_has_different_digests(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest_json(one) == digest_json(other)) == same


def test_the_digest_of_files_depends_on_names_and_content(tmp_path):
    def digest(**files: str) -> str:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return digest_files([tmp_path / name for name in files])

    first = digest(a="1", b="2")
    assert digest(a="1", b="2") == first
    assert len({first, digest(a="1", b="3"), digest(a="1", c="2"), digest(a="1")}) == 4


# JSON


@examples(200)
@given(data=plain)
def test_written_json_reads_back_the_same(data):
    assert json.loads(to_json(data)) == data


def test_lists_of_numbers_stay_on_one_line():
    text = to_json({"keep": {"a": list(range(50)), "b": []}, "history": [{"x": 1}, {"y": [2, 3]}]})
    lines = [line.strip() for line in text.splitlines()]
    assert json.dumps(list(range(50))) in lines[2]
    assert '"y": [2, 3]' in lines


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_json_object_is_read(tmp_path):
    assert read_json(written(tmp_path / "a.json", b'{"a": [1]}'), "a thing") == {"a": [1]}


@pytest.mark.parametrize("content", [b"", b"{", b"words", b"[1]", b'"a"', b"null", b"\xff\xfe\x00"])
def test_anything_but_a_json_object_is_a_damaged_artefact(tmp_path, content):
    path = written(tmp_path / "a.json", content)
    with pytest.raises(ArtefactError, match=f"{path} is not a thing"):
        read_json(path, "a thing")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"x": "\xff"}', "not text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"", "an empty file"),
    ],
    ids=["depth", "digits", "bytes", "image", "empty"],
)
def test_json_that_the_parser_gives_up_on_is_a_damaged_artefact(tmp_path, content, says):
    path = written(tmp_path / "a.json", content)
    with pytest.raises(ArtefactError, match=f"{path} is not a thing: .*{says}"):
        read_json(path, "a thing")


def test_json_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "MOST_JSON", 100)
    monkeypatch.setattr(kinds.json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ArtefactError, match="larger than"):
        read_json(written(tmp_path / "a.json", b'{"x": "' + b"a" * 200 + b'"}'), "a thing")


def test_a_path_that_can_not_be_read_is_a_usage_error(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(UsageError, match=f"can't read a thing {path}"):
            read_json(path, "a thing")


# where to write


def test_missing_folders_of_an_output_are_made(tmp_path):
    check_output(tmp_path / "a" / "b" / "file", "file")
    assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b" / "file").exists()


def test_a_file_in_place_of_the_folder_is_a_usage_error(tmp_path):
    written(tmp_path / "a", b"")
    with pytest.raises(UsageError, match="can't create the folder"):
        check_output(tmp_path / "a" / "file", "file")


def test_a_folder_that_is_not_writable_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=f"{tmp_path} is not writable"):
        check_output(tmp_path / "file", "file")


def test_a_path_without_a_name_is_a_usage_error():
    with pytest.raises(UsageError, match="not a name for a mask"):
        check_output(Path("/"), "mask")
