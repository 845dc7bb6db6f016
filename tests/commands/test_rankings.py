"""Rankings that are kept somewhere: listed, verified, and taken where the inputs are the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.artefacts import tiny_ranking
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import saved_model

from optin_cli.artefacts.ranking import read_ranking, write_ranking
from optin_cli.artefacts.rankings import places
from optin_cli.errors import UsageError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a user's cache of its own and no variable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPTIN_RANKINGS", raising=False)
    return tmp_path


def kept(path: Path, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_ranking(path, tiny_ranking(**changes))
    return path


def listed(*args: object, code: int = 0) -> dict[str, tuple[str, str | None]]:
    """Path -> (place, problem)."""
    found = json.loads(run("rankings", *args, "--json", code=code).stdout)["rankings"]
    return {one["path"]: (one["place"], one["problem"]) for one in found}


def test_the_places_in_their_order(here, monkeypatch):
    mine, shared = kept(Path("rankings/a.h5")), kept(here / "shared" / "b.h5")
    cached, other = kept(here / "cache" / "optin" / "rankings" / "c.h5"), kept(here / "d.h5")
    monkeypatch.setenv("OPTIN_RANKINGS", f"{here / 'absent'}{os.pathsep}{here / 'shared'}")
    (here / "shared" / "notes.h5").write_text("not a ranking")
    found = listed(other, here / "shared")
    assert list(found)[:4] == [str(other), str(shared), str(mine), str(cached)]
    assert [place for place, _ in found.values()][:4] == ["given", "given", "here", "user cache"]
    assert [name for name, _ in places()][:3] == ["here", "OPTIN_RANKINGS", "user cache"]
    assert "repository" in [name for name, _ in places()]  # the tests run in a clone
    assert "notes.h5" not in " ".join(found)
    with pytest.raises(UsageError, match="no ranking and no folder"):
        places([here / "absent"])


def test_verifying_finds_what_is_damaged(here):
    good, bad = kept(here / "rankings" / "good.h5"), kept(here / "rankings" / "bad.h5", seed=1)
    run("rankings", "verify", here / "rankings")
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    found = listed("verify", here / "rankings", code=3)
    assert found[str(good)][1] is None and "damaged" in found[str(bad)][1]
    assert "bad.h5" in run("rankings", "verify", bad, code=3).stderr
    assert "good.h5" not in run("rankings", "verify", bad, code=3).stdout  # what is named is verified alone
    assert "damaged" in run("rankings", here / "rankings").stdout  # listing is no check


def test_those_of_one_model(here):
    model, data = saved_model("bert"), tiny_text_csv(here)
    run("score", model, "--data", data, "-o", here / "rankings" / "bert.h5", *FAST, "-q")
    kept(here / "rankings" / "other.h5")
    assert set(listed("--model", model)) == {"rankings/bert.h5"}


def test_score_takes_a_ranking_of_the_same_inputs_and_says_so(here, monkeypatch):
    from optin_cli.scoring import score as stage

    model, data = saved_model("bert"), tiny_text_csv(here)
    command = ("score", model, "--data", data, *FAST)
    run(*command, "-o", here / "rankings" / "first.h5", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "score_once", None)  # nothing is scored
        done = run(*command, "-o", here / "second.h5")
        assert "rankings/first.h5 (here) ranks the same weights on the same rows" in done.stderr
        assert (here / "second.h5").read_bytes() == (here / "rankings" / "first.h5").read_bytes()
        shutil.move(here / "rankings", here / "elsewhere")
        (here / "second.h5").unlink()
        done = run(*command, "-o", here / "third.h5", "--reuse", here / "elsewhere", "--json")
        assert json.loads(done.stdout)["reused_from"] == str(here / "elsewhere" / "first.h5")
    done = run(*command, "-o", here / "fourth.h5", "--json")  # it isn't looked for anywhere else
    assert json.loads(done.stdout)["reused_from"] is None
    done = run(*command, "-o", here / "fifth.h5", "--reuse", here / "third.h5", "--force", "--json")
    assert json.loads(done.stdout)["reused_from"] is None


@pytest.mark.parametrize(
    "changed",
    [
        ("--samples", 6),
        ("--no-sketch",),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (("--seed", 1), ("--lambda", 0.1))),
    ],
)
def test_other_settings_are_scored(here, changed):
    model, data = saved_model("bert"), tiny_text_csv(here)
    run("score", model, "--data", data, *FAST, "-o", here / "rankings" / "first.h5", "-q")
    command = ("score", model, "--data", data, *FAST, *changed, "-o", here / "second.h5")
    done = run(*command, "--explain", "--json")
    assert json.loads(done.stdout)["reused_from"] is None
    name = {"--no-sketch": "sketch_rows"}.get(changed[0], changed[0].removeprefix("--"))
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("rankings/first.h5: "))
    assert f"{name} was" in line
    assert read_ranking(here / "second.h5").digest != read_ranking(here / "rankings" / "first.h5").digest


def test_a_ranking_of_other_weights_is_explained_where_it_is_named(here):
    """In a folder it is passed by unread; a file that somebody gave is compared."""
    data = tiny_text_csv(here)
    first = kept(here / "first.h5")
    command = ("score", saved_model("bert"), "--data", data, *FAST, "--explain", "-q")
    assert f"{first}: model was" in run(*command, "-o", here / "a.h5", "--reuse", first).stderr
    assert "model was" not in run(*command, "-o", here / "b.h5", "--reuse", here).stderr
