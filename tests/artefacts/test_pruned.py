"""`optin.json`, the record that makes a folder a pruned model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.artefacts import ASKED, REACHED
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.architectures.families import family_from_dict, family_to_dict, known_families
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, read_checked, read_pruned, write_pruned
from optin_cli.errors import ArtefactError, UsageError

DENSE = {
    "id": "org/model",
    "digest": "m" * 64,
    "params": 10,
    "macs_per_token": 6.0,
    "macs_per_pair": 0.0,
    "site_params": 8.0,
}
STEP = {
    "model": {"id": "org/model", "digest": "m" * 64},
    "ranking": "r" * 64,
    "mask": "k" * 64,
    "budget": ASKED,
    "reached": REACHED,
    "versions": {},
    "deviation": 1e-7,
    "checked_on": "noise",
    "params": 7,
}


def a_record(**changes: Any) -> PrunedRecord:
    record = PrunedRecord(
        library="transformers",
        architecture="BertModel",
        task="embedding",
        family=json.loads(json.dumps(family_to_dict(known_families()[0]))),
        kept={"blocks.0.heads": [0, 2], "blocks.0.neurons": []},
        per_layer_config={"0": {"num_attention_heads": 2, "intermediate_size": 0}},
        dense=dict(DENSE),
        history=[dict(STEP)],
    )
    return dataclasses.replace(record, **changes)


def change(folder: Path, edit: Callable[[dict], Any]) -> Path:
    write_pruned(folder, a_record())
    data = json.loads((folder / FILE_NAME).read_text())
    edit(data)
    (folder / FILE_NAME).write_text(json.dumps(data))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        read_pruned(folder)
    assert str(folder / FILE_NAME) in str(caught.value)
    return str(caught.value)


numbers = st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False), max_size=3)
kept = st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 99), max_size=5), max_size=3)


@examples(60)
@given(
    kept=kept,
    dense=numbers,
    history=st.lists(numbers, min_size=1, max_size=3),
    sizes=st.dictionaries(
        st.text(max_size=3), st.dictionaries(st.text(max_size=5), st.integers()), max_size=3
    ),
)
def test_a_written_record_reads_back_the_same(tmp_path_factory, kept, dense, history, sizes):
    folder = tmp_path_factory.mktemp("pruned")
    steps = [{**more, **STEP} for more in history]
    record = a_record(kept=kept, dense={**dense, **DENSE}, history=steps, per_layer_config=sizes)
    write_pruned(folder, record)
    assert read_pruned(folder) == record


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_the_family_in_a_record_is_the_whole_table(tmp_path, family):
    write_pruned(tmp_path, a_record(family=family_to_dict(family)))
    assert family_from_dict(read_pruned(tmp_path).family) == family


def test_keys_of_a_later_program_are_passed_over(tmp_path):
    assert read_pruned(change(tmp_path, lambda data: data.update(colour="red"))) == a_record()


LATER = ("merges", "resized", "sized_config")  # what records of former programs lack


@pytest.mark.parametrize("field", [o.name for o in dataclasses.fields(PrunedRecord) if o.name not in LATER])
def test_a_missing_field_is_named_with_the_way_out(tmp_path, field):
    message = refused(change(tmp_path, lambda data: data.pop(field)))
    assert f"{field} is missing" in message and "optin apply" in message


@pytest.mark.parametrize("field", ["task", "family", "kept", "per_layer_config", "dense", "history"])
def test_a_field_of_another_kind_is_refused_by_name(tmp_path, field):
    assert field in refused(change(tmp_path, lambda data: data.update({field: 3})))


def test_a_record_of_before_tokens_merged_reads_as_one_that_merges_none(tmp_path):
    def older(data):
        data["schema_version"] = 1
        for name in LATER:
            data.pop(name, None)

    assert read_pruned(change(tmp_path, older)) == a_record()


@pytest.mark.parametrize("version", [4, "1", None])
def test_a_schema_that_is_newer_or_no_number_is_refused(tmp_path, version):
    assert "update optin" in refused(change(tmp_path, lambda data: data.update(schema_version=version)))


def test_json_of_something_else_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"format": "something"}')
    assert "not the record of a pruned model" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    refused(tmp_path)


def test_a_folder_without_a_record_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=FILE_NAME):
        read_pruned(tmp_path)


@pytest.mark.parametrize(
    ("change_to", "says"),
    [
        ({"history": []}, "history is empty"),
        ({"history": [{}]}, "history[0].model is missing"),
        ({"history": [{**STEP, "reached": {}}]}, "history[0].reached.flops is missing"),
        (
            {"history": [{**STEP, "compensation": {"method": "full", "sites": [{}]}}]},
            "sites[0].site is missing",
        ),
        ({"history": [{**STEP, "params": "7"}]}, "history[0].params must be a whole number"),
        ({"dense": {}}, "dense.id is missing"),
        ({"dense": {**DENSE, "params": None}}, "dense.params must be a whole number"),
        ({"kept": {"a": [None]}}, "kept.a[0] must be a whole number"),
    ],
    ids=str,
)
def test_a_record_that_lacks_what_is_in_its_parts_is_refused(tmp_path, change_to, says):
    assert says in refused(change(tmp_path, lambda data: data.update(change_to)))


@pytest.mark.parametrize("name", ["deviation", "checked_on", "params"])
def test_what_was_never_compared_is_no_finished_model(tmp_path, name):
    change(tmp_path, lambda data: data["history"][0].pop(name))
    assert read_pruned(tmp_path).history  # as it is while it is compared
    with pytest.raises(ArtefactError, match=f"{name} is missing"):
        read_checked(tmp_path)
