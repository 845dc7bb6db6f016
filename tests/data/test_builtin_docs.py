"""`builtin:docs`: sentences that every machine with the same Python agrees on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optin_cli.data import docs, prose
from optin_cli.data.prose import SPLITS
from optin_cli.data.sources import BUILTIN_DOCS, DataSpec, open_split
from optin_cli.errors import UsageError


def test_there_are_enough_sentences_to_calibrate_and_to_evaluate():
    assert len(docs.split_sentences("train")) > 2000
    assert len(docs.split_sentences("validation")) > 500


def test_the_splits_share_no_sentence_and_leave_none_out():
    train, validation = (docs.split_sentences(split) for split in SPLITS)
    assert set(train).isdisjoint(validation)
    assert sorted([*train, *validation]) == list(docs.sentences())


@pytest.mark.slow
def test_the_sentences_are_the_same_when_read_again():
    first = docs.sentences()
    docs.sentences.cache_clear()
    assert docs.sentences() == first


def test_a_new_sentence_moves_no_other_one_to_another_split(monkeypatch):
    before = {split: docs.split_sentences(split) for split in SPLITS}
    new = "A sentence of a later Python version stands somewhere."
    more = tuple(sorted((*docs.sentences(), new)))
    monkeypatch.setattr(docs, "sentences", lambda: more)
    after = {split: docs.split_sentences(split) for split in SPLITS}
    for split in SPLITS:
        assert [s for s in after[split] if s != new] == before[split]


def test_every_sentence_is_a_plain_sentence():
    for sentence in docs.sentences():
        assert 5 <= len(sentence.split()) <= 40
        assert sentence[0].isupper() and sentence[-1] in ".!?"
        assert "  " not in sentence and "\n" not in sentence
        assert not re.search(r"[0-9_`<>{}\[\]=/\\]", sentence)


SOURCE = '''
"""This module has a docstring of its own. It has a second sentence, which goes
over two lines.

    >>> code_in_it(1) == 2

Too short. It uses `code` and is left out.

this one does not start with a capital letter.

This one has no end
"""
open("PROOF", "w").close()  # parsed, never run


class Something:
    """Classes have docstrings that count as well."""

    def method(self):
        """Methods and functions have them too, of course."""
        text = """A string that is no docstring does not count at all."""


async def function():
    """Even asynchronous functions can say what they do."""
'''


def test_docstrings_of_modules_classes_and_functions_are_read_without_running_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert docs._docstring_sentences(path) == {
        "This module has a docstring of its own.",
        "It has a second sentence, which goes over two lines.",
        "Classes have docstrings that count as well.",
        "Methods and functions have them too, of course.",
        "Even asynchronous functions can say what they do.",
    }
    assert not Path("PROOF").exists()


@pytest.mark.parametrize(
    "content", [b"def broken(:", b'"""\xff\xfe"""', b"\x00"], ids=["syntax", "text", "null"]
)
def test_a_file_that_is_no_python_gives_nothing(tmp_path, content):
    path = tmp_path / "module.py"
    path.write_bytes(content)
    assert docs._docstring_sentences(path) == set()


@pytest.mark.parametrize("split", SPLITS)
def test_the_docs_open_as_a_data_set_with_one_text_column(split):
    rows = open_split(DataSpec(BUILTIN_DOCS, split))
    assert rows.column_names == ["text"]
    assert rows["text"][:] == docs.split_sentences(split)


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"no split 'test'(.|\n)*train or validation"):
        open_split(DataSpec(BUILTIN_DOCS, "test"))


def test_other_built_in_data_is_a_usage_error():
    with pytest.raises(UsageError, match=r"'builtin:novels'(.|\n)*builtin:docs"):
        open_split(DataSpec("builtin:novels"))


def test_the_words_of_prose_are_not_those_of_docstrings():
    """Common words that are about people and things; a docstring has few of them."""
    common = {
        "he",
        "she",
        "his",
        "her",
        "had",
        "was",
        "were",
        "night",
        "man",
        "woman",
        "people",
        "house",
        "water",
    }

    def share(texts):
        words = [word.strip('.,;:!?"').lower() for text in texts for word in text.split()]
        return sum(word in common for word in words) / len(words)

    assert share(prose.paragraphs()) > 5 * share(docs.sentences())
