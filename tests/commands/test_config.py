"""Defaults from the environment and from files: which one counts, and what is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.artefacts import tiny_ranking
from helpers.cli import run

from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.commands import defaults


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, without anything in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("OPTIN_")]:
        monkeypatch.delenv(name)
    return tmp_path


def project(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder / "pyproject.toml"


def in_force(*args: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(command, option) -> what `optin config` says of it."""
    rows = json.loads(run(*args, "config", "--json").stdout)["options"]
    return {(row["command"], row["option"]): row for row in rows}


def share(*args: object) -> float:
    """The budget that a mask was made for, by the defaults in force."""
    run("select", "r.h5", "-o", "m.json", "-q", "--force", *args)
    return read_mask(Path("m.json")).budget["flops"]


def test_flags_come_before_variables_and_those_before_the_file(here, monkeypatch):
    write_ranking(here / "r.h5", tiny_ranking())
    project(here, "[tool.optin]\nflops = 0.9\n[tool.optin.select]\nflops = 0.8\n")
    assert share() == 0.8
    monkeypatch.setenv("OPTIN_FLOPS", "0.7")
    assert share() == 0.7
    monkeypatch.setenv("OPTIN_SELECT_FLOPS", "0.6")
    assert share() == 0.6
    assert share("--flops", 0.5) == 0.5


def test_the_nearest_project_counts_and_a_named_file_in_its_place(here, monkeypatch):
    write_ranking(here / "r.h5", tiny_ranking())
    project(here, "[tool.optin]\nflops = 0.9\n")
    inner = here / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert in_force()["select", "--flops"]["value"] == "0.9"
    project(here / "a", "[tool.other]\nflops = 0.1\n")  # nearer, and about something else
    assert in_force()["select", "--flops"]["source"] == "default"
    (here / "c.yaml").write_text("select:\n  flops: [0.7, 0.6]\n  round_to: 2\n")
    found = in_force("--config", "../../c.yaml")
    assert found["select", "--flops"]["value"] == "0.7,0.6"
    assert found["select", "--round-to"]["value"] == "2"
    assert found["select", "--flops"]["origin"] == "select.flops in ../../c.yaml"
    monkeypatch.setenv("OPTIN_CONFIG", str(here / "c.yaml"))
    assert in_force()["select", "--flops"]["value"] == "0.7,0.6"


def test_every_option_has_a_variable_but_those_that_are_typed_by_hand(here, monkeypatch):
    options = in_force()
    assert len(options) > 200
    for command in {command for command, _ in options}:
        own = {option: row for (of, option), row in options.items() if of == command}
        with monkeypatch.context() as patch:
            for option in own:
                patch.setenv(variable(command, option), "1")  # a switch, a number or a text
            now = json.loads(run("config", command, "--json").stdout)["options"]
        for row in now:
            by_hand = row["option"] == "--trust-remote-code"
            assert row["source"] == ("default" if by_hand else "environment"), row
            assert row["origin"] == ("" if by_hand else variable(command, row["option"]))


def variable(command: str, option: str) -> str:
    return f"OPTIN_{command}_{option[2:]}".replace("-", "_").upper()


def test_values_are_of_the_option_s_type(here):
    project(here, "[tool.optin.score]\nsamples = 12\nlambda = 0.5\nsketch = false\nreuse = ['a', 'b']\n")
    found = in_force()
    named = {"--samples": 12, "--lambda": 0.5, "--sketch": False, "--reuse": ["a", "b"]}
    assert {name: found["score", name]["value"] for name in named} == named
    assert found["prune", "--samples"]["source"] == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("smples = 12", "smples is no option of any command (did you mean samples?)"),
        ("[tool.optin.score]\nflops = 0.5", "score.flops is no option of `optin score`"),
        ("[tool.optin.scores]\nsamples = 1", "scores is no command of optin (did you mean score?)"),
        ("trust-remote-code = true", "trust-remote-code can't be set in a file"),
        ("sketch = 'yes'", "sketch is a switch: true or false, not 'yes'"),
        ("samples = true", "samples is True: a text or a number is needed"),
        ("samples = [[1]]", "samples is [[1]]: a text or a number is needed"),
        ("samples = ", "is not TOML"),
    ],
)
def test_what_a_file_holds_wrongly_is_refused_by_name(here, text, says):
    path = project(here, f"[tool.optin]\n{text}\n" if "[tool" not in text else text)
    for command in ("config", "families"):
        message = run(command, code=2).stderr
        assert says in message and str(path) in message


@pytest.mark.parametrize("content", ["- 1", "select: {flops: 1", "a: &a [*a]", "select: 3", "\xff"])
def test_a_named_file_that_is_no_table_is_refused(here, content):
    (here / "c.yaml").write_text(content, encoding="latin-1")
    assert "c.yaml" in run("--config", "c.yaml", "config", code=2).stderr
    assert "no.yaml" in run("--config", "no.yaml", "config", code=2).stderr


def test_a_wrong_value_is_refused_with_its_source(here, monkeypatch):
    path = project(here, "[tool.optin]\nsamples = 'many'\n")
    score = ("score", "m", "--data", "d", "-o", "r.h5")
    for command in (score, ("config",)):
        message = " ".join(run(*command, code=2).stderr.split())
        assert f"samples in {path}" in message
    monkeypatch.setenv("OPTIN_SAMPLES", "0")
    message = run(*score, code=2).stderr
    assert "--samples 0: at least 1" in message and "--samples comes from OPTIN_SAMPLES" in message
    monkeypatch.setenv("OPTIN_SAMPLES", "9")
    monkeypatch.setenv("OPTIN_SCORE_LAMBDA", "nan")
    assert "--lambda comes from OPTIN_SCORE_LAMBDA" in run(*score, code=2).stderr


def test_columns_that_are_set_for_all_commands_are_no_mistake_where_no_data_is_given(here):
    project(here, "[tool.optin]\ntext = 'a'\n")
    apply = ("apply", "m", "m.json", "-o", "out")
    assert "can't read" in run(*apply, code=2).stderr  # the mask: it got that far
    assert "--data, which is not given" in run(*apply, "--text", "a", code=2).stderr


def test_a_variable_that_sets_nothing_is_mentioned(here, monkeypatch):
    monkeypatch.setenv("OPTIN_SAMPELS", "9")
    assert "OPTIN_SAMPELS sets nothing" in run("families").stderr
    monkeypatch.setenv("OPTIN_SAMPLES", "9")
    assert "OPTIN_SAMPLES sets nothing" not in run("families").stderr


def test_a_project_that_does_not_mention_optin_is_not_read(here):
    project(here, "not TOML at all")
    assert in_force()["score", "--samples"]["source"] == "default"
    assert defaults.read_defaults(None, {}).path is None


def test_config_lists_what_is_set_and_all_of_one_command(here):
    project(here, "[tool.optin.score]\nsamples = 12\n")
    shown = run("config").stdout
    assert "score --samples" in shown and "--probes" not in shown
    assert "score --probes" in run("config", "score").stdout
    assert "no command" in run("config", "scor", code=2).stderr


# ---- the log ----


def test_a_log_has_what_stderr_shows_and_more(here):
    write_ranking(here / "r.h5", tiny_ranking())
    shown = run("select", "r.h5", "--flops", 0.6, "-o", "m.json", "--log-file", "logs/run.log")
    log = (here / "logs" / "run.log").read_text()
    for line in shown.stderr.splitlines():
        assert line.strip() in log
    assert "Z " in log and "ended after" in log
    run("select", "r.h5", "--flops", 2, "-o", "n.json", "--log-file", "logs/run.log", code=2)
    more = (here / "logs" / "run.log").read_text()
    assert more.startswith(log) and "error: " in more.removeprefix(log)


def test_a_log_that_can_not_be_written_is_refused_first(here):
    write_ranking(here / "r.h5", tiny_ranking())
    done = run("select", "r.h5", "--flops", 0.6, "-o", "m.json", "--log-file", ".", code=2)
    assert "--log-file" in done.stderr and not (here / "m.json").exists()


def test_nothing_is_written_where_no_log_is_asked_for(here):
    write_ranking(here / "r.h5", tiny_ranking())
    run("select", "r.h5", "--flops", 0.6, "-o", "m.json", "-q")
    assert {path.name for path in here.iterdir()} == {"r.h5", "m.json"}
