"""Fields that say what they hold: checking, reading, writing and mapping paths follow, and the page prints them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from optin_cli.architectures.families import family_from_dict, known_families
from optin_cli.architectures.paths import joined, within
from optin_cli.architectures.schema import SiteTable, TokenTable
from optin_cli.errors import UsageError
from optin_cli.structure.anatomy import Bypass, Producer, RelativePositions, Site, UnitInput
from optin_cli.structure.fields import (
    COUNT,
    PATH,
    PATHS,
    Listed,
    Record,
    by_path,
    described,
    from_plain,
    holds,
    kind_of,
    map_paths,
    problems,
    shortened,
)

ROOT = Path(__file__).resolve().parents[2]


def page_tables():
    spec = importlib.util.spec_from_file_location("field_tables", ROOT / "docs/field_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the page ----


def test_the_page_has_the_tables_that_the_classes_make():
    tables = page_tables()
    page = (ROOT / "docs/anatomy.md").read_text()
    assert tables.with_tables(page) == page, "run python docs/field_tables.py"
    for cls in tables.CLASSES:
        assert tables.field_table(cls) in page


def test_every_field_of_a_table_is_on_the_page_and_has_a_meaning():
    tables = page_tables()
    for cls in tables.CLASSES:
        assert [one.name for one in described(cls)] == [one.name for one in fields(cls)]
        assert set(tables.docstrings(cls)) == {one.name for one in fields(cls)}


# ---- a site and its table ----


def test_what_a_site_shares_with_its_table_is_the_same_in_both():
    table = {one.name: kind_of(one) for one in described(SiteTable)}
    for one in described(Site):
        assert kind_of(one) is table[one.name]


def test_a_site_leaves_no_path_of_its_table_undescribed():
    site = {one.name for one in described(Site)}
    own = {one.name for one in fields(Site)} - site
    resolved = {"name", "group"}  # a label made longer; the number that an attribute holds
    assert own & {one.name for one in described(SiteTable)} == resolved


FULL = SiteTable(
    kind="heads",
    producers=(Producer("q"), Producer("kv", parts=2, width=3)),
    consumer="",
    name="cross",
    carried=("bn", "dw.conv"),
    readers=("se.reduce",),
    masked_at="se",
    norm="",
    unit_width="attn.head_dim",
    group="attn.groups",
    counts={"attn.heads": "units"},
    unit_inputs=(UnitInput("attn", "bias", -3, maker="make", needs="has_bias"),),
    tensors={"attn.table": 1},
    relative=RelativePositions("attn.kinds"),
    bypass=Bypass("attn", cache="past"),
    must_be_identity=("attn.norm",),
    requires=("gate",),
)


def test_every_path_is_mapped_and_nothing_else():
    assert map_paths(FULL, lambda path: joined("b.0", path)) == SiteTable(
        kind="heads",
        producers=(Producer("b.0.q"), Producer("b.0.kv", parts=2, width=3)),
        consumer="b.0",
        name="cross",
        carried=("b.0.bn", "b.0.dw.conv"),
        readers=("b.0.se.reduce",),
        masked_at="b.0.se",
        norm="",
        unit_width="b.0.attn.head_dim",
        group="b.0.attn.groups",
        counts={"b.0.attn.heads": "units"},
        unit_inputs=(UnitInput("b.0.attn", "bias", -3, maker="make", needs="has_bias"),),
        tensors={"b.0.attn.table": 1},
        relative=RelativePositions("b.0.attn.kinds"),
        bypass=Bypass("b.0.attn", cache="past"),
        must_be_identity=("b.0.attn.norm",),
        requires=("b.0.gate",),
    )


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_mapping_there_and_back_changes_nothing(family):
    for table in family.sites:
        there = map_paths(table, lambda path: joined("b.0", path))
        assert there != table
        assert map_paths(there, lambda path: within("b.0", path)) == table


def test_the_prefix_of_tokens_counts_from_the_base_model_and_stays():
    table = TokenTable("qkv", "attn", "mask", prefix=("cls",), part=1)
    assert map_paths(table, lambda path: f"b.{path}") == TokenTable("b.qkv", "b.attn", "mask", ("cls",), 1)


# ---- errors ----


def a_table(**site) -> dict:
    sites = [{"kind": "neurons", "producers": ["up"], "consumer": "down", **site}]
    return {"name": "mixer", "matches": ["Mixer"], "blocks": "layers", "sites": sites}


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"producers": [{"path": "up", "parts": "none"}]}, "sites[0].producers[0].parts must be a number above 0"),
        ({"producers": [{"parts": 3}]}, "sites[0].producers[0].path is missing"),
        ({"producers": [{"path": "up", "pieces": 3}]}, "unknown field sites[0].producers[0].pieces"),
        (
            {"producers": ["up", 3]},
            "sites[0].producers[1] must be a path or {path, parts, by_unit, shared, per_batch, width}, not 3",
        ),
        ({"carried": ["bn", 3]}, "sites[0].carried must be a list of paths, not ['bn', 3]"),
        ({"unit_inputs": [{"module": "a", "argument": "b"}]}, "sites[0].unit_inputs[0].axis is missing"),
        ({"bypass": "up"}, "sites[0].bypass must be {module, in_tuple, cache, attended, empty}, not 'up'"),
        ({"counts": {"up.size": "heads"}}, "sites[0].counts must be attribute: units, features, width or scale"),
        ({"name": "a.b"}, "sites[0].name must be a word without dots, not 'a.b'"),
        ({"kind": "filters"}, "sites[0].kind must be heads, neurons or channels, not 'filters'"),
    ],
)  # fmt: skip
def test_an_error_names_the_innermost_field_and_what_it_must_be(site, said):
    with pytest.raises(UsageError) as caught:
        family_from_dict(a_table(**site))
    assert said in caught.value.what


def test_several_problems_are_listed_up_to_five():
    wrong = {"colour": "red", "carried": 1, "readers": 2, "pairs": 3, "name": 4, "norm": 5, "requires": 6}
    with pytest.raises(UsageError, match="and 2 more") as caught:
        family_from_dict(a_table(**wrong))
    assert caught.value.what.count("sites[0].") == 5


def test_streams_stand_in_for_blocks_and_one_of_them_is_needed():
    table = a_table()
    del table["blocks"]
    with pytest.raises(UsageError, match="blocks is missing"):
        family_from_dict(table)
    assert family_from_dict({**table, "streams": [{"blocks": ["a.*"]}]}).all_streams[0].blocks == ("a.*",)
    with pytest.raises(
        UsageError, match=r"streams\[0\]\.blocks must be a path or a list of patterns, not \[\]"
    ):
        family_from_dict({**table, "streams": [{"blocks": []}]})


# ---- a schema of one's own ----


@dataclass(frozen=True)
class Wheel:
    axle: str = field(metadata=holds(PATH))
    spokes: int = field(default=8, metadata=holds(COUNT))


@dataclass(frozen=True)
class Car:
    wheels: tuple[Wheel, ...] = field(metadata=holds(Listed("a list of wheels", Record(Wheel, short="axle"))))
    doors: tuple[str, ...] = field(default=("left",), metadata=holds(PATHS))
    weights: dict[str, int] = field(
        default_factory=dict, metadata=holds(by_path("path: kg", lambda v: v > 0))
    )
    speed: float = 0.0


def test_any_dataclass_can_say_what_its_fields_hold():
    car = Car((Wheel("front"), Wheel("back", 9)), ("left", "right"), {"boot": 3}, speed=2.0)
    plain = {
        "wheels": ["front", {"axle": "back", "spokes": 9}],
        "doors": ["left", "right"],
        "weights": {"boot": 3},
    }
    assert shortened(car) == plain
    assert problems(Car, plain) == []
    assert from_plain(Car, plain) == Car(car.wheels, car.doors, car.weights)
    assert map_paths(car, str.upper) == Car(
        (Wheel("FRONT"), Wheel("BACK", 9)), ("LEFT", "RIGHT"), {"BOOT": 3}, speed=2.0
    )
    assert shortened(Car((Wheel("front"),))) == {"wheels": ["front"]}
    assert problems(Car, {"doors": [], "speed": 1.0}) == ["unknown field speed", "wheels is missing"]
