"""What artefacts say in JSON: the typed entries are those that are written, whatever the model and the request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NotRequired, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from helpers.artefacts import latency_table, tiny_ranking
from helpers.interactions import sketch_of
from helpers.models import shared_model
from helpers.pruning import pruned

from optin_cli.artefacts.facts import (
    Asked,
    Curve,
    DataFacts,
    DenseFacts,
    ModelFacts,
    Objective,
    PruningStep,
    Reached,
    TimedModel,
    TimedSetting,
    TimedSite,
)
from optin_cli.artefacts.mask import mask_to_json
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

ROOT = Path(__file__).resolve().parents[2]


def check(facts: dict, kind: type, where: str = "") -> None:
    """Exactly the entries of a typed dict, of the types it says; in nested ones too."""
    hints = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
    assert set(hints) - optional <= set(facts) <= set(hints), where
    for name, value in facts.items():
        hint = get_args(hints[name])[0] if name in optional else hints[name]
        inner = [one for one in (hint, *get_args(hint)) if is_typeddict(one)]
        if inner and get_origin(hint) is dict:
            for key, one in value.items():
                check(one, inner[0], f"{where}.{name}.{key}")
        elif inner and value is not None:
            check(value, inner[0], f"{where}.{name}")
        else:
            assert fits(value, hint), f"{where}.{name} is {value!r}, not {hint}"


def fits(value, hint) -> bool:
    """Whether a JSON value is of a plain type, a list of one or one of several."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is None:
        return isinstance(value, int | float) if hint is float else hint is type(None) or type(value) is hint
    if origin in (list, dict):
        return isinstance(value, origin)
    if args and origin.__name__ == "Sequence":
        return isinstance(value, list)
    return any(
        (one is type(None) and value is None) or (one is not type(None) and fits(value, one)) for one in args
    )


@pytest.mark.parametrize("name", ["bert", "timm-vit", "timm-vgg"])
def test_a_model_from_score_to_apply(name, tmp_path):
    _, mask, applied = pruned(name, tmp_path, flops=0.7)
    ranking = read_ranking(tmp_path / "r.h5")
    check(ranking.model, ModelFacts, "model")
    check(ranking.data, DataFacts, "data")
    check(ranking.dense, DenseFacts, "dense")
    text = json.loads(mask_to_json(mask))
    for key, kind in (
        ("budget", Asked),
        ("reached", Reached),
        ("objective", Objective),
        ("calibration", DataFacts),
    ):
        check(text[key], kind, key)
    record = json.loads((applied.path / "optin.json").read_text())
    check(record["dense"], DenseFacts, "record.dense")
    (step,) = record["history"]
    check(step, PruningStep, "step")
    assert {"compensation", "deviation", "checked_on", "params"} <= set(step)


@pytest.mark.parametrize(
    "request_",
    [
        {"flops": 0.5},
        {"params": 0.9, "memory": 1.0, "relative_to": "current"},
        {"latency": 0.7, "latency_ms": 50.0},
        {"flops": 0.5, "feature_weights": (0.0, 0.5, 1.0)},
        {"flops": 0.5, "interactions": "global"},
    ],
    ids=str,
)
def test_every_kind_of_request(request_):
    ranking = tiny_ranking()
    table = latency_table(ranking.sites)
    sketch = sketch_of(ranking) if "interactions" in request_ else None
    mask = json.loads(mask_to_json(select(ranking, Request(**request_, table=table, force=True), sketch)))
    for key, kind in (("budget", Asked), ("reached", Reached), ("objective", Objective)):
        check(mask[key], kind, key)


def test_a_latency_table():
    table = latency_table(shared_model("bert").anatomy)
    check(table.model, TimedModel, "model")
    check(table.setting, TimedSetting, "setting")
    for curve in table.curves:
        check(curve, Curve, "curve")
    for site in table.sites.values():
        check(site, TimedSite, "site")


def test_the_saved_ranking_of_the_repository():
    ranking = read_ranking(ROOT / "rankings/all-minilm-l6-v2.docs.h5")
    check(ranking.model, ModelFacts, "model")
    check(ranking.data, DataFacts, "data")
    check(ranking.dense, DenseFacts, "dense")
