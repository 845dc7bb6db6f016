"""Finding the text, image and label columns from the features, and checking the ones that were named."""

from __future__ import annotations

import pytest
from helpers.lazy import Lazy
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.data.columns import Columns, find_columns
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError

datasets = Lazy("datasets")


KINDS = {
    "text": lambda: datasets.Value("string"),
    "long text": lambda: datasets.Value("large_string"),
    "number": lambda: datasets.Value("int64"),
    "real": lambda: datasets.Value("float64"),
    "class": lambda: datasets.ClassLabel(names=["bad", "good"]),
    "image": lambda: datasets.Image(),
    "words": lambda: datasets.List(datasets.Value("string")),
    "tags": lambda: datasets.List(datasets.ClassLabel(names=["O", "NAME"])),
}


def rows(**kinds: str) -> datasets.Dataset:
    """An empty data set with the named columns."""
    features = datasets.Features({name: KINDS[kind]() for name, kind in kinds.items()})
    return datasets.Dataset.from_dict({name: [] for name in kinds}, features=features)


def found(dataset: datasets.Dataset, modality: str = "text", **given) -> Columns:
    return find_columns(dataset, DataSpec("DATA", **given), modality)


PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("text1", "text2"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_usual_pairs_are_found_in_their_order_among_other_text(pair):
    second, first = reversed(pair), pair
    columns = found(rows(id="text", **dict.fromkeys(second, "text"), title="text", label="class"))
    assert columns == Columns(text=first, label="label")


@pytest.mark.parametrize("name", ["sentence", "text", "content", "review", "tweet", "sentence1"])
def test_a_usual_text_column_is_found_among_other_text(name):
    assert found(rows(title="text", **{name: "text"}, url="text")).text == (name,)


def test_the_only_text_column_is_taken_whatever_its_name():
    assert found(rows(utterance="text", idx="number")) == Columns(text=("utterance",))


def test_two_text_columns_are_a_pair_whatever_their_names():
    assert found(rows(query="text", passage="text", idx="number")).text == ("query", "passage")


def test_long_strings_are_text():
    assert found(rows(document="long text")).text == ("document",)


def test_the_label_is_never_taken_for_text():
    columns = found(rows(utterance="text", label="text"))
    assert columns == Columns(text=("utterance",), label="label")


def test_a_label_given_by_the_user_is_never_taken_for_text():
    columns = found(rows(utterance="text", intent="text"), label="intent")
    assert columns == Columns(text=("utterance",), label="intent")


@pytest.mark.parametrize("name", ["label", "labels", "score", "similarity_score", "fine_label", "target"])
@pytest.mark.parametrize("kind", ["number", "real", "class"])
def test_a_usual_label_column_is_found(name, kind):
    assert found(rows(text="text", **{name: kind})).label == name


def test_a_class_column_of_another_name_is_a_label():
    assert found(rows(text="text", idx="number", emotion="class")).label == "emotion"


def test_a_data_set_may_have_no_label():
    assert found(rows(text="text", idx="number")).label is None


def test_columns_can_be_named():
    columns = found(rows(a="text", b="text", c="text", d="real"), text=("c", "a"), label="d")
    assert columns == Columns(text=("c", "a"), label="d")


# token classification


def test_a_column_of_words_is_text_with_its_tags():
    columns = found(rows(tokens="words", ner_tags="tags"))
    assert columns == Columns(text=("tokens",), label="ner_tags", words=True)


def test_words_go_before_an_identifier_that_happens_to_be_text():
    """CoNLL 2003 and WNUT 17 number their sentences in a text column named id."""
    columns = found(rows(id="text", tokens="words", pos_tags="tags", ner_tags="tags"))
    assert columns == Columns(text=("tokens",), label="ner_tags", words=True)


def test_named_words_are_words():
    assert found(rows(id="text", tokens="words", tags="tags"), text=("tokens",)).words


# images


@pytest.mark.parametrize("name", ["image", "img", "picture"])
def test_the_only_image_column_is_taken_whatever_its_name(name):
    columns = found(rows(**{name: "image", "label": "class"}), "image")
    assert columns == Columns(image=name, label="label")


def test_of_several_images_the_one_named_image_is_taken():
    assert found(rows(depth="image", image="image"), "image").image == "image"


def test_several_images_of_other_names_must_be_named():
    dataset = rows(left="image", right="image")
    with pytest.raises(UsageError, match=r"left, right(.|\n)*with image"):
        found(dataset, "image")
    assert found(dataset, "image", image="right").image == "right"


def test_text_beside_an_image_is_no_input_of_an_image_model():
    assert found(rows(image="image", caption="text"), "image").text == ()


# refusals


def test_data_without_text_names_what_it_has():
    with pytest.raises(InputError, match="no text column; it has image, label"):
        found(rows(image="image", label="class"))


def test_a_label_alone_is_no_text():
    with pytest.raises(InputError, match="no text column"):
        found(rows(label="text"))


def test_data_without_images_names_what_it_has():
    with pytest.raises(InputError, match="no image column; it has text, label"):
        found(rows(text="text", label="class"), "image")


def test_several_text_columns_that_are_no_usual_pair_must_be_named():
    with pytest.raises(UsageError, match=r"several text columns: a, b, c(.|\n)*with text="):
        found(rows(a="text", b="text", c="text"))


@pytest.mark.parametrize(
    "given", [{"text": ("nothing",)}, {"label": "nothing"}, {"text": ("text", "nothing")}]
)
def test_a_named_column_that_is_not_there_lists_the_ones_that_are(given):
    with pytest.raises(UsageError, match=r"no column 'nothing'(.|\n)*text, label"):
        found(rows(text="text", label="class"), **given)


@pytest.mark.parametrize("name", ["idx", "picture", "label"])
def test_a_named_text_column_that_holds_no_text_is_refused(name):
    dataset = rows(text="text", idx="number", picture="image", label="class")
    with pytest.raises(UsageError, match=f"'{name}' of DATA holds no text"):
        found(dataset, text=(name,))


@pytest.mark.parametrize("name", ["caption", "label"])
def test_a_named_image_column_that_holds_no_image_is_refused(name):
    with pytest.raises(UsageError, match=name):
        found(rows(image="image", caption="text", label="class"), "image", image=name)


def test_three_text_columns_are_refused():
    with pytest.raises(UsageError, match="one or two"):
        found(rows(a="text", b="text", c="text"), text=("a", "b", "c"))


column_names = st.text("abcdefgh", min_size=1, max_size=4) | st.sampled_from(
    [n for pair in PAIRS for n in pair]
)


@examples(150)
@given(kinds=st.dictionaries(column_names, st.sampled_from(sorted(KINDS)), max_size=5))
@pytest.mark.parametrize("modality", ["text", "image"])
def test_whatever_the_columns_what_is_found_is_there_and_of_its_kind(modality, kinds):
    try:
        columns = found(rows(**kinds), modality)
    except (InputError, UsageError):
        return
    if modality == "image":
        assert kinds[columns.image] == "image"
        return
    assert 1 <= len(columns.text) <= 2
    assert columns.label not in columns.text
    texts = {"words"} if columns.words else {"text", "long text"}
    assert {kinds[name] for name in columns.text} <= texts
