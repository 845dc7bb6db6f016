"""Values of a wrong type in a model's own files: one message that says where, whatever a library makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import copy_of, saved_model

from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import open_model

Change = Callable[[dict[str, Any]], Any]


def no_such_token(content: dict[str, Any]) -> None:
    """A template that the tokenizers library takes, and gives up on with a text."""
    first = {"SpecialToken": {"id": "missing", "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [one, two],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
    }


def edited(name: str, folder: Path, file: str, change: Change) -> Path:
    copied = copy_of(saved_model(name), folder / "m")
    content = json.loads((copied / file).read_text()) if (copied / file).is_file() else {}
    change(content)
    (copied / file).write_text(json.dumps(content))
    return copied


def used(folder: Path) -> None:
    model = open_model(str(folder))
    model.processor  # noqa: B018 - a property that opens the tokenizer or the image processor


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("bert", "config.json", lambda c: c.update(hidden_size=True)),
        ("bert", "config.json", lambda c: c.update(eos_token_id="x")),
        ("bert", "config.json", lambda c: c.update(dtype="nothing")),
        ("bert", "config.json", lambda c: c.update(architectures=3)),
        ("bert", "config.json", lambda c: c.update(id2label=[1])),
        ("bert", "tokenizer_config.json", lambda c: c.update(model_max_length="x")),
        ("bert", "tokenizer_config.json", lambda c: c.update(model_max_length=-1)),
        ("bert", "tokenizer_config.json", lambda c: c.update(model_input_names=["input_ids", 3.5])),
        ("bert", "tokenizer.json", no_such_token),
        ("bert", "tokenizer.json", lambda c: c.update(model=[1])),
        ("bert", "sentence_bert_config.json", lambda c: c.update(max_seq_length="long")),
        ("vit", "preprocessor_config.json", lambda c: c.update(size="large")),
        ("vit", "preprocessor_config.json", lambda c: c.update(image_mean="grey")),
        ("timm-vit", "config.json", lambda c: c.update(model_args={"embed_dim": "wide"})),
        ("timm-vit", "config.json", lambda c: c.update(model_args=3)),
        ("timm-vit", "config.json", lambda c: c.update(num_classes="many")),
        ("timm-vit", "config.json", lambda c: c.update(architecture=["a"])),
    ],
    ids=[
        "size", "token", "dtype", "architectures", "labels", "length", "negative", "names", "template", "vocabulary",
        "sentence", "image size", "mean", "timm args", "no args", "classes", "architecture",
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_one_message(tmp_path, capfd, name, file, change):
    folder = edited(name, tmp_path, file, change)
    with pytest.raises(InputError) as caught:
        used(folder)
    assert str(folder) in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_that_names_no_mask_gives_one_all_the_same(tmp_path):
    folder = edited(
        "bert", tmp_path, "tokenizer_config.json", lambda c: c.update(model_input_names=["input_ids"])
    )
    (row,) = open_model(str(folder)).processor.tokenize(["a b"])
    assert len(row["attention_mask"]) == len(row["input_ids"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": ' + "9" * 5000 + "}", "[]", "{", ""])
def test_a_config_that_is_no_json_of_a_config_is_one_message(tmp_path, text):
    folder = copy_of(saved_model("bert"), tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="can't be read"):
        used(folder)
