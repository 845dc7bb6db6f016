"""What a scoring method is to the others: nobody asks for its name, and a new one is one class."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import FAST, run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model, shared_model
from helpers.plugins import install

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.scoring import score as stage
from optin_cli.scoring.methods import registry
from optin_cli.scoring.methods.base import ScoringMethod
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings
from optin_cli.selection.select import select

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "optin_cli"
NAMES = {method.name for method in registry.BUILT_IN}


@pytest.fixture
def methods(monkeypatch):
    """The registry as it was, once the test is over."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    return registry.METHODS


def example() -> str:
    """The new method that CONTRIBUTING shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "register_method" in block]
    return code


def plan_for(name: str, folder: Path, method: str) -> Plan:
    image = name != "bert"
    data = tiny_image_folder(folder / "images") if image else tiny_text_csv(folder, labels=None, pairs=False)
    settings = ScoreSettings(method=method, samples=12, batch_size=4)
    return make_plan(shared_model(name), DataSpec(str(data)), settings)


# ---- CONTRIBUTING's example ----


def test_the_example_is_short():
    assert len(example().splitlines()) <= 45


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_the_example_scores_by_its_definition(name, tmp_path, methods):
    """One example at a time, without padding; each unit's features cut out by hand."""
    exec(example(), {})
    plan = plan_for(name, tmp_path, "activation")
    found = stage.score(plan, tmp_path / "r.h5")
    seen: dict[str, np.ndarray] = {}

    def keep(site):
        return lambda _, inputs: seen.__setitem__(site.name, inputs[0].reshape(-1, site.units * site.width))

    module, batches = plan.model.module, plan.calibration.batches
    handles = [
        module.get_submodule(s.consumer).register_forward_pre_hook(keep(s)) for s in plan.model.anatomy
    ]
    expected = {site.name: np.zeros(site.units) for site in plan.model.anatomy}
    for batch in batches:
        sums, tokens = {name: np.zeros(len(units)) for name, units in expected.items()}, 0
        for row in range(len(batch)):
            real = slice(None) if batch.valid is None else batch.valid[row]
            inputs = {
                k: v[row : row + 1][:, real] if v.dim() == 2 else v[row : row + 1]
                for k, v in batch.inputs.items()
            }
            with torch.inference_mode():
                plan.model.output(inputs)
            tokens += len(next(iter(seen.values())))
            for site in plan.model.anatomy:
                for unit in range(site.units):
                    features = seen[site.name][:, unit * site.width : (unit + 1) * site.width]
                    sums[site.name][unit] += float(features.double().square().sum())
        for site in plan.model.anatomy:
            expected[site.name] += sums[site.name] / tokens * len(batch) / batches.count
    for handle in handles:
        handle.remove()
    for site in found.sites:
        np.testing.assert_allclose(site.score, expected[site.name], rtol=1e-4)
    assert read_ranking(tmp_path / "r.h5").digest == found.digest
    mask = select(found, 0.5)
    kept = {site.name: site.score[mask.keep[site.name]] for site in found.sites if mask.keep[site.name]}
    lost = {site.name: np.delete(site.score, mask.keep[site.name]) for site in found.sites}
    assert all(lost[name].max(initial=0) <= scores.min() for name, scores in kept.items())


def test_the_example_scores_channels(tmp_path, methods):
    exec(example(), {})
    found = stage.score(plan_for("timm-resnet", tmp_path, "activation"), tmp_path / "r.h5")
    assert {site.kind for site in found.sites} == {"channels"}
    assert any(np.ptp(site.score) > 0 for site in found.sites)


def test_the_example_resumes_by_itself(tmp_path, methods, monkeypatch):
    exec(example(), {})
    whole = stage.score(plan_for("bert", tmp_path, "activation"), tmp_path / "whole.h5")
    method, done = methods["activation"], []
    real = method.run

    def killed(self, item, on_work):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(item.batch)
        return real(self, item, on_work)

    monkeypatch.setattr(method, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_for("bert", tmp_path, "activation"), tmp_path / "r.h5")
    monkeypatch.setattr(
        method, "run", lambda self, item, tell: done.append(item.batch) or real(self, item, tell)
    )
    assert stage.score(plan_for("bert", tmp_path, "activation"), tmp_path / "r.h5").digest == whole.digest
    assert sorted(done) == [0, 1, 2]


# ---- plugins ----


def test_the_command_line_finds_the_method_of_a_package(tmp_path, methods, monkeypatch):
    (tmp_path / "site").mkdir()
    install(
        tmp_path / "site",
        monkeypatch,
        example(),
        registry.ENTRY_POINTS,
        "activation = otherpackage:ActivationMethod",
    )
    data, output = tiny_text_csv(tmp_path), tmp_path / "r.h5"
    command = ["score", saved_model("bert"), "--data", data, "-o", output, *FAST]
    refused = run(*command, "--method", "activations", code=2)
    assert "curvature" in refused.stderr and re.search(r"\bactivation\b", refused.stderr.split("\n", 1)[1])
    run(*command, "--method", "activation")
    assert read_ranking(output).method == "activation"
    run("select", output, "--flops", 0.5, "-o", tmp_path / "m.json")
    told = run("select", output, "--flops", 0.5, "--lambda", 1, "-o", tmp_path / "n.json", code=2)
    assert "no parts to recombine" in told.stderr


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("activation = nosuchpackage:Method", "can't load nosuchpackage:Method"),
        ("activation = otherpackage:Missing", "can't load otherpackage:Missing"),
        ("activation = otherpackage:ActivationMethod.run", "is not a ScoringMethod"),
        ("other = otherpackage:ActivationMethod", "is not a ScoringMethod with the name 'other'"),
    ],
)
def test_a_package_whose_method_is_none(entry, words, tmp_path, methods, monkeypatch):
    install(tmp_path, monkeypatch, example(), registry.ENTRY_POINTS, entry)
    with pytest.raises(InputError, match=words):
        registry.method_named(entry.split(" ")[0])


@pytest.mark.parametrize(
    ("name", "words"), [("curvature", "built-in"), ("A-b", "lower-case"), ("", "lower-case")]
)
def test_names_that_can_not_be_registered(name, words, methods):
    with pytest.raises(UsageError, match=words):
        registry.register_method(type("Other", (ScoringMethod,), {"name": name}))
    assert set(methods) == NAMES


# ---- names ----


def constants(path: Path) -> list[str]:
    return [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_nothing_outside_asks_for_a_method_by_its_name():
    """As a whole string, in code: messages and docstrings may speak of methods."""
    allowed = {"scoring/settings.py": {DEFAULT_METHOD}, "selection/problem.py": {"curvature"}}  # of a message
    variants = ("trials/", "reporting/")  # a sweep's masks of random units are called `random`, too
    found = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        named = NAMES & set(constants(path)) - ({"random"} if place.startswith(variants) else set())
        if named and not place.startswith("scoring/methods/"):
            found[place] = named
    assert found == allowed


def test_methods_that_are_recommended_exist():
    """Two errors once sent people to a method that was gone."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    texts = [text for path in PACKAGE.rglob("*.py") for text in constants(path)]
    texts += [page.read_text() for page in pages]
    named = {name for text in texts for name in re.findall(r"--method[ =]`?([a-z][\w-]*\w)", text)}
    assert {"curvature", "activation"} <= named  # the second is the example's
    assert named - {"activation"} <= NAMES


def test_the_help_of_method_names_all_of_them():
    (method,) = (field for field in dataclasses.fields(ScoreSettings) if field.name == "method")
    assert set(re.findall(r"[\w-]+", method.metadata["help"])) >= NAMES


def test_what_needs_labels_recommends_what_does_not(tmp_path):
    data = tiny_text_csv(tmp_path, labels=None)
    command = ["score", saved_model("bert"), "--data", data, "-o", tmp_path / "r.h5", *FAST, "--method"]
    told = run(*command, "fisher", code=2).stderr
    (others,) = re.findall(r"use (.*), which need no labels", told.replace("\n", " "))
    others = re.split(", | or ", others)
    assert set(others) == NAMES - {"fisher"}
    run(*command, others[0])


def test_what_has_no_parts_recommends_what_has(tmp_path):
    ranking = stage.score(plan_for("bert", tmp_path, "magnitude"), tmp_path / "r.h5")
    told = run(
        "select", tmp_path / "r.h5", "--flops", 0.5, "--lambda", 1, "-o", tmp_path / "m.json", code=2
    ).stderr
    (other,) = re.findall(r"--method (\w+)", told)
    assert registry.METHODS[other].recombines and not registry.METHODS[ranking.method].recombines
