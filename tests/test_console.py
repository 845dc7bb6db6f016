"""Tables on a terminal that is narrower than they are."""

from __future__ import annotations

import io
import logging
import re

from optin_cli import console
from optin_cli.errors import InputError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch, *table, **options) -> list[str]:
    """The lines of a table on a terminal of 80 columns, without their styles."""
    shown = Terminal()
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", shown)  # here, for pytest puts its own there before each test
    console.table("", *table, stdout=True, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()


def test_no_number_is_cut_off(monkeypatch):
    columns = ["model", "batch", *(f"column {i}" for i in range(12))]
    rows = [[f"models/{name}", "32", *(f"{i}.123456" for i in range(12))] for name in ("dense", "small")]
    lines = printed(monkeypatch, columns, rows, keys=2)
    assert max(map(len, lines)) <= 80
    words = " ".join(lines)
    assert all(column in words for column in columns)
    assert all(words.count(cell) >= 2 for cell in rows[0][2:])
    parts = words.count("column 0") + sum(line.startswith("models/small") for line in lines) - 1
    assert parts == sum(line.startswith("model ") for line in lines) > 1


def test_words_are_folded_and_names_stay_whole(monkeypatch):
    name, fits = "clip-image-classifier", "CLIPForImageClassification"
    note = "a unit goes from all layers that share it, whatever their number may be"
    words = " ".join(printed(monkeypatch, ["family", "fits", "note"], [[name, fits, note]], numbers=False))
    assert name in words
    assert "\u2026" not in words


CONTROL = "\x1b[2J\x1b]52;c;aGk=\x07\r\x9b1m\u202e\x00"
WRITTEN_OUT = r"\x1b[2J\x1b]52;c;aGk=\x07\r\x9b1m\u202e\x00"


def test_control_characters_of_a_name_are_written_out(capsys):
    console.configure(quiet=False)  # a command that ran before may have been quiet
    console.note(f"note {CONTROL}")
    console.error(InputError(f"{CONTROL} is bad", f"look at {CONTROL}"))
    console.unexpected(ValueError(CONTROL))
    logging.getLogger("optin").warning("careful: %s", CONTROL)
    console.facts(CONTROL, [["name", CONTROL]])
    console.table(CONTROL, ["a", CONTROL], [["x", CONTROL]], stdout=True)
    console.table("", [CONTROL], [[CONTROL]])
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not console._CONTROL.search(text)
    assert out.count(WRITTEN_OUT) == 5 and err.count(WRITTEN_OUT) == 6  # an error ends with its first line
