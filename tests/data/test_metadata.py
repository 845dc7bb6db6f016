"""Metadata files beside recordings and images: what is damaged is told by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.data import tiny_audio_folder, tiny_image_folder

from optin_cli.data.metadata import read_metadata
from optin_cli.data.sources import DataSpec, open_split, open_stream
from optin_cli.errors import InputError

CSV = "file_name,label\n{0},a\n{1},b\n"
JSONL = '{{"file_name": "{0}", "label": "a"}}\n{{"file_name": "{1}", "label": "b"}}\n'

# name of the file, line that is damaged, what it says, why it can't be used
DAMAGED = {
    "no JSON": ("metadata.jsonl", 2, b'{"file_name": oops}', "no JSON: Expecting value"),
    "cut off": ("metadata.jsonl", 1, b'{"file_name": "a.p', "no JSON: Unterminated string"),
    "no object": ("metadata.jsonl", 2, b"[1, 2]", "no JSON object"),
    "JSON in Latin-1": ("metadata.jsonl", 2, '{"file_name": "é"}'.encode("latin-1"), "not UTF-8"),
    "too many columns": ("metadata.csv", 3, b"a.png,b,c", "more than 2 columns"),
    "an open quote": ("metadata.csv", 2, b'a.png,"b', "unexpected end of data"),
    "CSV in Latin-1": ("metadata.csv", 3, "a.png,é".encode("latin-1"), "not UTF-8"),
}


def write(folder: Path, name: str, line: int | None = None, content: bytes = b"") -> Path:
    """A metadata file about two of the files below `folder`, with one line of it replaced."""
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    text = {"metadata.csv": CSV, "metadata.jsonl": JSONL}[name].format(*files)
    lines = text.encode().splitlines(keepends=True)
    if line is not None:
        lines[line - 1] = content + b"\n"
    (folder / name).write_bytes(b"".join(lines))
    return folder / name


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("folder_of", [tiny_audio_folder, tiny_image_folder])
def test_a_damaged_line_is_told_by_file_and_line(folder_of, case, tmp_path):
    name, line, content, why = DAMAGED[case]
    path = write(folder_of(tmp_path, n=2), name, line, content)
    for opening in (open_split, open_stream):
        with pytest.raises(InputError, match=why) as told:
            list(opening(DataSpec(str(tmp_path))))
        assert f"line {line} of {path} " in told.value.what


@pytest.mark.parametrize("content", [b'{"label": "b"}', b'{"file_name": 3}', b'{"file_name": ""}'])
def test_a_recording_without_a_path_is_told_by_file_and_line(content, tmp_path):
    path = write(tiny_audio_folder(tmp_path, n=2), "metadata.jsonl", 2, content)
    with pytest.raises(InputError, match="file_name has to be the path") as told:
        open_split(DataSpec(str(tmp_path)))
    assert f"line 2 of {path} " in told.value.what


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("folder_of", [tiny_audio_folder, tiny_image_folder])
def test_a_whole_file_is_read(folder_of, name, tmp_path):
    write(folder_of(tmp_path, n=2), name)
    assert open_split(DataSpec(str(tmp_path)))["label"][:] == ["a", "b"]


def test_lines_end_at_newlines_alone_and_may_be_empty(tmp_path):
    """A separator that Unicode counts as an end of line may stand within a text."""
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(
        '\ufeff{"file_name": "a", "text": "one\u2028two"}\r\n\r\n{"file_name": "b"}\r\n'.encode()
    )
    assert read_metadata(path) == [(1, {"file_name": "a", "text": "one\u2028two"}), (3, {"file_name": "b"})]
    path = tmp_path / "metadata.csv"
    path.write_bytes(b'file_name,text\r\na,"one\r\ntwo"\r\n\r\nb,three\r\n')
    assert read_metadata(path) == [
        (3, {"file_name": "a", "text": "one\r\ntwo"}),
        (5, {"file_name": "b", "text": "three"}),
    ]
