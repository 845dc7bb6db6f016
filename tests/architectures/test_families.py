"""Family tables: registering, reading and writing them, and what happens without one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.families import ALL, MORE_TRANSFORMERS
from helpers.models import new_model, saved_model
from helpers.runs import examples, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optin_cli.architectures import families
from optin_cli.architectures.families import (
    DOCS,
    Family,
    SiteTable,
    family_from_dict,
    family_to_dict,
    family_to_yaml,
    find_family,
    known_families,
    read_family,
    register_family,
)
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.errors import UnknownArchitecture, UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.structure.anatomy import HEADS, NEURONS, Producer, UnitInput


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A copy of the registry, so that no test changes it for another."""
    monkeypatch.setattr(families, "_REGISTRY", dict(families._REGISTRY))


def a_family(name: str = "mixer", matches: tuple[str, ...] = ("Mixer",), **changes) -> Family:
    sites = (SiteTable(NEURONS, producers=(Producer("up"),), consumer="down"),)
    return dataclasses.replace(Family(name, matches, "layers", sites), **changes)


class Mixer(nn.Module):
    """A model that no library ships: two Linears a block."""

    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, inner), "down": nn.Linear(inner, 4)}) for _ in range(2)
        )


def test_a_registered_family_is_found_by_its_class_name():
    register_family(a_family())
    module = Mixer()
    anatomy = dissect(module, family_of(module))
    assert [(s.name, s.units) for s in anatomy] == [("blocks.0.neurons", 6), ("blocks.1.neurons", 6)]


def test_a_subclass_of_a_known_class_is_found():
    register_family(a_family())
    subclass = type("MyMixer", (Mixer,), {})
    assert family_of(subclass()).name == "mixer"


def test_a_model_type_goes_before_the_class_name():
    bert = families._REGISTRY.pop("bert")
    for family in (a_family(matches=("BertModel",)), bert):
        register_family(family)
    assert family_of(new_model("bert", "encoder")).name == "bert"


def test_a_family_that_claims_anothers_match_is_refused_and_both_are_named():
    with pytest.raises(UsageError, match=r"'mixer'.*roberta.*'roberta'"):
        register_family(a_family(matches=("Mixer", "roberta")))
    assert find_family(["Mixer"]) is None
    assert find_family(["roberta"]).name == "roberta"


def test_a_family_of_the_same_name_replaces_the_table():
    replacement = a_family(name="bert", matches=("bert", "Mixer"))
    register_family(replacement)
    assert find_family(["bert"]) == replacement
    assert [f.name for f in known_families()].count("bert") == 1


def test_known_families_are_sorted_and_cover_what_is_promised():
    names = [family.name for family in known_families()]
    assert names == sorted(names)
    assert {"bert", "roberta", "distilbert", "electra", "mpnet", "vit", "timm-vit"} <= set(names)
    assert {"beit", "dinov2", "clip-vision", "clip-text", "timm-eva", "timm-beit"} <= set(names)


@pytest.mark.parametrize("name", ALL)
def test_every_promised_architecture_has_a_table(name):
    config = json.loads((saved_model(name) / "config.json").read_text())
    assert find_family([config.get("model_type", "VisionTransformer")]) is not None


def test_an_unknown_architecture_names_the_nearest_families_and_points_to_the_page():
    with pytest.raises(UnknownArchitecture) as caught:
        family_of(Mixer())
    message = str(caught.value)
    assert "Mixer" in message
    assert DOCS == "docs/anatomy.md" and DOCS in message
    nearest = message.partition("The nearest known are ")[2].partition(";")[0]
    assert sum(f"{family.name} (" in nearest for family in known_families()) == 5
    assert "`optin families` lists all" in message


def test_an_unknown_model_type_is_named():
    import transformers

    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=5)
    with pytest.raises(UnknownArchitecture, match=r"BloomModel.*'bloom'"):
        family_of(transformers.BloomModel(config))


def test_a_model_of_two_towers_is_refused_and_the_way_out_works(tmp_path):
    """The hint's classes open a tower that optin prunes, in the space that both towers share."""
    import transformers

    vision, text = MORE_TRANSFORMERS["clip-vision"][1], MORE_TRANSFORMERS["clip-text"][1]
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    both = transformers.CLIPModel(config).eval()
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(UnknownArchitecture, match="CLIPModel has two towers") as caught:
        open_model(str(tmp_path / "both"), device="cpu")
    for tower, features in (("Vision", both.get_image_features), ("Text", both.get_text_features)):
        name = f"CLIP{tower}ModelWithProjection"
        assert name in str(caught.value)
        getattr(transformers, name).from_pretrained(tmp_path / "both").save_pretrained(tmp_path / tower)
        model = open_model(str(tmp_path / tower), device="cpu")
        inputs = random_inputs(model)
        with torch.no_grad():
            expected = nn.functional.normalize(features(**inputs).pooler_output, dim=-1)
            torch.testing.assert_close(model.output(inputs)[:, 0], expected)


paths = st.from_regex(r"[a-z]{1,6}(\.[a-z_]{1,6}){0,2}", fullmatch=True)
producers = st.lists(st.builds(Producer, paths, st.integers(1, 3)), min_size=1, max_size=3).map(tuple)
sites = st.builds(
    SiteTable,
    kind=st.sampled_from([HEADS, NEURONS]),
    producers=producers,
    consumer=paths,
    unit_width=st.one_of(st.integers(1, 64), paths),
    counts=st.dictionaries(paths, st.sampled_from(["units", "features"]), max_size=2),
    unit_inputs=st.lists(st.builds(UnitInput, paths, paths, st.integers(0, 3)), max_size=2).map(tuple),
    must_be_identity=st.lists(paths, max_size=2).map(tuple),
    requires=st.lists(paths, max_size=2).map(tuple),
)
any_family = st.builds(
    Family,
    name=st.text(min_size=1, max_size=10),
    matches=st.lists(paths, min_size=1, max_size=3).map(tuple),
    blocks=paths,
    sites=st.lists(sites, min_size=1, max_size=3).map(tuple),
    modality=st.sampled_from(["text", "image"]),
    note=st.text(max_size=20),
)


@examples(60)
@given(family=any_family)
def test_a_family_survives_json(family):
    assert family_from_dict(json.loads(json.dumps(family_to_dict(family)))) == family


@examples(60)
@given(family=any_family)
def test_a_family_survives_a_yaml_file(tmp_path_factory, family):
    path = tmp_path_factory.mktemp("family") / "family.yaml"
    plain = json.loads(json.dumps(family_to_dict(family)))  # YAML writes no tuples
    path.write_text(yaml.safe_dump(plain, allow_unicode=True), encoding="utf-8")
    assert read_family(path) == family


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_every_shipped_family_survives_json(family):
    assert family_from_dict(json.loads(json.dumps(family_to_dict(family)))) == family


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_every_shipped_family_survives_the_yaml_that_is_written(tmp_path, family):
    assert read_family(written(tmp_path, family_to_yaml(family, ["why", "and how"]))) == family


def test_the_yaml_that_is_written_holds_nothing_that_is_the_default():
    assert yaml.safe_load(family_to_yaml(a_family())) == yaml.safe_load(TABLE)


TABLE = """
name: mixer
matches: [Mixer]
blocks: layers
sites:
  - kind: neurons
    producers: [up]
    consumer: down
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "family.yaml"
    path.write_text(text)
    return path


def test_a_short_table_may_give_producers_as_paths(tmp_path):
    assert read_family(written(tmp_path, TABLE)) == a_family()


def test_a_json_table_is_read_too(tmp_path):
    assert read_family(written(tmp_path, json.dumps(yaml.safe_load(TABLE)))) == a_family()


def without(key: str) -> str:
    table = yaml.safe_load(TABLE)
    (table if key in table else table["sites"][0]).pop(key)
    return yaml.safe_dump(table)


@pytest.mark.parametrize("key", ["name", "matches", "blocks", "sites", "kind", "producers", "consumer"])
def test_a_table_without_a_needed_key_is_refused_naming_the_key_and_the_file(tmp_path, key):
    path = written(tmp_path, without(key))
    with pytest.raises(UsageError, match=key) as caught:
        read_family(path)
    assert str(path) in str(caught.value)
    assert DOCS in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("neurons", "filters", "filters"),
        ("consumer: down", "consumer: down\n    comsumer: x", "comsumer"),
        ("blocks: layers", "blocks: layers\ncolour: red", "colour"),
        ("[up]", "[{path: up, pieces: 3}]", "pieces"),
    ],
)
def test_an_unknown_key_or_kind_is_a_usage_error_that_names_it(tmp_path, old, new, named):
    text = TABLE.replace(old, new)
    assert text != TABLE
    with pytest.raises(UsageError, match=named):
        read_family(written(tmp_path, text))


WRONG_KINDS = {
    "matches a word": ("matches: [Mixer]", "matches: Mixer"),
    "matches a number": ("[Mixer]", "7"),
    "producers a word": ("producers: [up]", "producers: up"),
    "producers a number": ("[up]", "3"),
    "parts a word": ("[up]", "[{path: up, parts: none}]"),
    "blocks a number": ("blocks: layers", "blocks: 3"),
    "modality unknown": ("blocks: layers", "blocks: layers\nmodality: smell"),
    "site a word": ("  - kind: neurons", "  - just a word\n  - kind: neurons"),
    "consumer a list": ("consumer: down", "consumer: [down]"),
    "counts a list": ("consumer: down", "consumer: down\n    counts: [up.size]"),
    "counts of nothing known": ("consumer: down", "consumer: down\n    counts: {up.size: heads}"),
    "width a list": ("consumer: down", "consumer: down\n    unit_width: [4]"),
    "requires a word": ("consumer: down", "consumer: down\n    requires: gate"),
    "tensors a list": ("consumer: down", "consumer: down\n    tensors: [up.bias]"),
    "axis a word": ("consumer: down", "consumer: down\n    tensors: {up.bias: first}"),
    "bypass a word": ("consumer: down", "consumer: down\n    bypass: up"),
    "layout unknown": ("blocks: layers", "blocks: layers\nlayout: nwhc"),
    "hierarchical a number": ("blocks: layers", "blocks: layers\nhierarchical: 1"),
    "no patterns": ("blocks: layers", "blocks: []"),
    "width zero": ("consumer: down", "consumer: down\n    unit_width: 0"),
}


@pytest.mark.parametrize(("old", "new"), WRONG_KINDS.values(), ids=WRONG_KINDS.keys())
def test_a_value_of_the_wrong_kind_is_a_usage_error(tmp_path, old, new):
    text = TABLE.replace(old, new)
    assert text != TABLE
    with pytest.raises(UsageError):
        read_family(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "not YAML"), ("- 1\n- 2\n", "no table"), ("", "no table"), ("just words", "no table")],
)
def test_a_file_that_is_no_table_is_a_usage_error(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        read_family(written(tmp_path, text))


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_family(tmp_path / "nothing.yaml")


def test_a_file_that_is_no_text_is_a_usage_error(tmp_path):
    path = tmp_path / "family.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UsageError):
        read_family(path)


def test_yaml_cannot_make_python_objects(tmp_path):
    proof = tmp_path / "ran"
    path = written(tmp_path, f"!!python/object/apply:os.mkdir ['{proof}']")
    with pytest.raises(UsageError):
        read_family(path)
    assert not proof.exists()


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
REST = "sites: [{kind: neurons, producers: [fc1], consumer: fc2}]\nblocks: layers\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{ALIASES}{REST}name: m\nmatches: *a8\n",
        f"{ALIASES}{REST}name: *a8\n",
        f"{REST}name: &n [*n]\n",
        f"{REST}name: {'[' * 5000}{']' * 5000}\n",
        f"{REST}name: {'9' * 5000}\n",
        f"{REST}name: !!python/object/apply:os.system ['true']\n",
        f"{REST}name: m\nmatches: {'x' * 2**20}\n",
        f"{REST}name: m\nmatches: [1, {'x' * 5000}]\n",
    ],
    ids=["aliases", "aliases in a name", "cycle", "depth", "digits", "tag", "size", "long value"],
)
def test_hostile_yaml_is_a_short_usage_error(tmp_path, text):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_family(tmp_path / "f.yaml")
    assert str(tmp_path / "f.yaml") in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_may_save_lines(tmp_path):
    (tmp_path / "f.yaml").write_text("name: &n m\nmatches: [*n]\n" + REST)
    assert read_family(tmp_path / "f.yaml").matches == ("m",)
