"""What `--json` prints is what docs/schemas/ says, for every command and every kind of output."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.lazy import Lazy
from helpers.models import saved_model
from helpers.pages import script

from optin_cli.commands.inspect_outputs import OUTPUTS
from optin_cli.main import COMMANDS
from optin_cli.trials import search

jsonschema = Lazy("jsonschema")

SCHEMAS = script("json_schemas")
QUICK = ("--device", "cpu")
TIMED = ("--repeats", 1, "--seconds", 0, "--batch-size", 1, "--seq-len", 8, *QUICK)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Command -> what it printed, once for each kind of output."""
    work = tmp_path_factory.mktemp("json")
    model, data = saved_model("bert", blocks=2), tiny_text_csv(work)
    r, mask, small, sweep = work / "r.h5", work / "m.json", work / "small", work / "sweep"
    plain = ("--compensate", "none", *QUICK)
    commands: list[tuple[object, ...]] = [
        ("score", model, "--data", data, "-o", r, *FAST, *QUICK, "--dry-run"),
        ("score", model, "--data", data, "-o", r, *FAST, *QUICK),
        ("score", model, "--data", data, "-o", work / "again.h5", *FAST, *QUICK, "--reuse", work),
        ("select", r, "--flops", 0.6, "-o", mask),
        ("select", r, "--flops", "0.8,0.5", "-o", work / "m-{}.json"),
        ("apply", model, mask, "-o", small, *QUICK, "--samples", 12),
        ("apply", model, mask, "-o", small, *QUICK, "--samples", 12),
        ("prune", model, "--data", data, "--flops", 0.5, "-o", work / "p", "--ranking", r, *plain, *FAST),
        ("prune", model, "--data", data, "--max-drop", 90, "--no-bench", "-o", work / "q", "--ranking", r,
         *plain, *FAST),
        ("bench", small, "--baseline", model, *TIMED),
        ("bench", small, "--profile", *TIMED),
        ("bench", model, "--table", work / "t.json", *TIMED),
        ("bench", saved_model("llama", "language", blocks=1), "--new-tokens", 2, *TIMED[:-4], "--seq-len", 4, *QUICK),
        ("eval", small, "--baseline", model, "--data", data, *QUICK),
        ("export", small, "--to", "torch", "--data", data, "-o", work / "m.pt2"),
        ("push", small, "org/name", "--dry-run"),
        ("vocab", model, "--data", data, "-o", work / "fewer", *QUICK),
        ("inspect", work / "fewer"),
        ("sweep", model, "--data", data, "--flops", 0.5, "-o", sweep, *plain, *FAST,
         "--seconds", 0, "--repeats", 1, "--bench-batch-size", 1),
        ("pick", sweep, "--max-drop", 100),
        ("report", r, mask, "-o", work / "page.html"),
        *(("inspect", one) for one in (r, mask, work / "t.json", model, small, sweep, work / "m.pt2")),
        ("inspect", r, "--stability"),
        ("rankings", work),
        ("rankings", "verify", r),
        ("families",),
        ("families", "--trace", model, "-o", work / "table.yaml"),
        ("config",),
        ("config", "score"),
    ]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "STEP", 0.5)  # few trials
        for command in commands:
            shown = run(*command, "--json").stdout
            found.setdefault(str(command[0]), []).append(json.loads(shown))
    return found


def closed(schema: Any) -> Any:
    """A schema that takes no key that it does not name: what is printed is documented."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if "$defs" in inner:
        for name, record in inner["$defs"].items():
            if name not in SCHEMAS.OPEN:
                record["unevaluatedProperties" if "$ref" in record else "additionalProperties"] = False
        kinds = [one["$ref"].rpartition("/")[2] for one in inner.get("anyOf", [inner])]
        for name in kinds:
            inner["$defs"][name]["properties"]["schema_version"] = {}
    return inner


@pytest.mark.parametrize("command", OUTPUTS)
def test_what_is_printed_fits_the_schema(outputs, command):
    schema = closed(json.loads((SCHEMAS.FOLDER / f"{command}.json").read_text()))
    for output in outputs[command]:
        jsonschema.validate(output, schema)
        for key in list(output):  # a schema that takes anything would hold nothing
            less = {name: value for name, value in output.items() if name != key}
            optional = command in ("prune", "inspect") and key in OPTIONAL
            assert optional or not jsonschema.Draft202012Validator(schema).is_valid(less), key
        assert not jsonschema.Draft202012Validator(schema).is_valid({**output, "more": 1})


OPTIONAL = {"sweep", "best", "trials", "batches", "examples", "target", "near", "needed"}


@pytest.mark.parametrize("command", OUTPUTS)
def test_every_kind_of_output_was_printed(outputs, command):
    kinds = {json.dumps(sorted(set(output) - OPTIONAL)) for output in outputs[command]}
    assert len(kinds) == len(OUTPUTS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_schemas_are_what_the_types_say(command):
    assert (SCHEMAS.FOLDER / f"{command}.json").read_text() == SCHEMAS.text(command), (
        "run docs/json_schemas.py"
    )
    jsonschema.Draft202012Validator.check_schema(SCHEMAS.schema(command))


def test_every_command_prints_json_and_can_be_quiet():
    assert set(OUTPUTS) == set(COMMANDS)
    for command in COMMANDS:
        options = run(command, "--help").stdout
        assert "--json" in options and "--quiet" in options and "--log-file" in options


def test_a_quiet_command_says_nothing_but_its_result(tmp_path):
    model, data = saved_model("bert"), tiny_text_csv(tmp_path)
    run("score", model, "--data", data, "-o", tmp_path / "r.h5", *FAST, "-q")
    for command in (
        ("select", tmp_path / "r.h5", "--flops", 0.6, "-o", tmp_path / "m.json"),
        ("apply", model, tmp_path / "m.json", "-o", tmp_path / "small", "--compensate", "none"),
        ("eval", model, "--data", data),
        ("bench", model, *TIMED),
        ("inspect", tmp_path / "m.json"),
        ("rankings", tmp_path),
        ("config",),
        ("report", tmp_path / "r.h5", "-o", tmp_path / "page.html"),
        ("families", "--trace", model),
    ):
        done = run(*command, "-q")
        assert done.stderr == "" and done.stdout, command
