"""`push`: what it refuses, what it uploads, and its words when the hub refuses. No test reaches a network."""

from __future__ import annotations

import json
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors
import pytest
from helpers.cli import run
from helpers.hub import httpx, reached
from helpers.models import copy_of, saved_model
from helpers.pruning import pruned

import optin_cli
from optin_cli.data import hub as module
from optin_cli.errors import ArtefactError, InputError, UsageError
from optin_cli.pruning.push import Upload, finished, push


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    pruned("bert", folder)
    return folder / "out"


@pytest.fixture
def small(made, tmp_path):
    return copy_of(made, tmp_path / "small")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


class Hub:
    """The hub behind its real client, at the level of HTTP; an upload is noted."""

    def __init__(self, monkeypatch) -> None:
        self.repos: dict[str, list[str]] = {}
        self.branches = {"main"}
        self.answers: list[int | Exception] = []
        """Come first, whatever is asked: a status, or an error on the way."""
        self.asked: list[tuple[str, str]] = []
        self.uploads: list[dict] = []
        monkeypatch.setenv("HF_TOKEN", "hf_secret")

        def upload_folder(api, **options):
            self.uploads.append(options)
            return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")

        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append((request.method, path))
        if self.answers:
            next_ = self.answers.pop(0)
            if isinstance(next_, Exception):
                raise next_
            return httpx.Response(next_, json={"error": "no"}, request=request)
        if path == "/api/repos/create":
            asked = json.loads(request.content)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repos[name] = []
            self.created = asked
            return httpx.Response(200, json={"url": f"https://huggingface.co/{name}"}, request=request)
        name, _, rest = path.removeprefix("/api/models/").partition("/branch/")
        if rest:
            self.branches.add(rest)
            return httpx.Response(200, json={}, request=request)
        name, _, revision = name.partition("/revision/")
        if name not in self.repos:
            return httpx.Response(404, headers={"X-Error-Code": "RepoNotFound"}, json={}, request=request)
        if revision not in self.branches:
            return httpx.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, json={}, request=request)
        files = [{"rfilename": file} for file in self.repos[name]]
        return httpx.Response(200, json={"id": name, "siblings": files}, request=request)


@pytest.fixture
def hub(monkeypatch):
    made = Hub(monkeypatch)
    with reached(monkeypatch, made.answer):
        yield made


def test_a_new_repository_is_made_and_gets_every_file(small, hub):
    (small / ".hidden").write_text("x")
    done = push(small, "me/m", Upload(private=True, message="first"))
    (upload,) = hub.uploads
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert (
        upload["repo_id"] == "me/m" and upload["commit_message"] == "first" and upload["revision"] == "main"
    )
    visible = {path.name for path in small.iterdir() if not path.name.startswith(".")}
    assert set(upload["allow_patterns"]) == set(done.files) == visible
    assert done.url.endswith("me/m/commit/1")
    assert done.nbytes == sum((small / name).stat().st_size for name in visible)


def test_a_branch_is_made(small, hub):
    hub.repos["me/m"] = ["optin.json"]
    push(small, "me/m", Upload(revision="pruned-50"))
    assert hub.uploads[0]["revision"] == "pruned-50" and "pruned-50" in hub.branches
    assert ("POST", "/api/repos/create") not in hub.asked


def test_an_earlier_model_is_replaced_and_another_one_is_not(small, hub):
    hub.repos["me/m"] = ["optin.json", "model.safetensors"]
    push(small, "me/m")
    assert "*.safetensors" in hub.uploads[0]["delete_patterns"]
    hub.repos["me/other"] = [".gitattributes", "pytorch_model.bin"]
    with pytest.raises(UsageError, match="did not make"):
        push(small, "me/other")
    assert len(hub.uploads) == 1
    push(small, "me/other", force=True)
    hub.repos["me/empty"] = [".gitattributes", "README.md"]
    push(small, "me/empty")
    assert len(hub.uploads) == 3


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "does not accept the token"), (403, "may not write to me/m"), (400, "the hub refuses me/m")],
)
def test_a_refusal_is_one_sentence_and_is_not_repeated(small, hub, status, says, no_waiting):
    hub.answers = [status]
    with pytest.raises(InputError, match=says):
        push(small, "me/m")
    assert not no_waiting and not hub.uploads


def test_an_owner_that_is_not_there_is_named(small, hub):
    hub.answers = [404, 404]  # the repository, then where it is to be made
    with pytest.raises(InputError, match="check the name of me"):
        push(small, "me/m")


def test_a_name_that_is_taken_meanwhile_is_named(small, hub, monkeypatch):
    def upload_folder(api, **options):
        request = httpx.Request("POST", "https://huggingface.co")
        raise huggingface_hub.errors.HfHubHTTPError("x", response=httpx.Response(409, request=request))

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    with pytest.raises(InputError, match="at the same time"):
        push(small, "me/m")


@pytest.mark.parametrize("problem", [httpx.ConnectTimeout("slow"), httpx.ConnectError("down"), 503, 429])
def test_what_passes_is_tried_again_with_longer_pauses(small, hub, no_waiting, problem):
    hub.repos["me/m"] = ["optin.json"]
    hub.answers = [problem] * 2
    push(small, "me/m")
    assert no_waiting == [2, 4] and len(hub.uploads) == 1


def test_a_hub_that_stays_away_is_an_error_in_the_end(small, hub, no_waiting):
    hub.answers = [httpx.ConnectTimeout("slow")] * 10
    with pytest.raises(InputError, match="could not be reached in 4 tries"):
        push(small, "me/m")
    assert no_waiting == [2, 4, 8]


def test_without_a_token_or_offline_nothing_is_asked(small, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token"):
        push(small, "me/m")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        push(small, "me/m")
    assert not hub.asked


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/a b", "-x/y", ""])
def test_names_that_can_not_be_are_refused(small, hub, name):
    with pytest.raises(UsageError, match="not a name on the hub"):
        push(small, name)
    assert not hub.asked


def test_what_is_not_finished_is_refused(small, tmp_path, hub):
    with pytest.raises(UsageError, match="no directory"):
        push(tmp_path / "none", "me/m")
    with pytest.raises(ArtefactError, match="not a pruned model"):
        push(saved_model("bert"), "me/m")
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match="damaged"):
        push(small, "me/m")
    weights.unlink()
    with pytest.raises(ArtefactError, match="no weights"):
        push(small, "me/m")
    assert not hub.asked


def test_a_link_out_of_the_directory_is_not_uploaded(small, tmp_path):
    (tmp_path / "secret").write_text("x")
    (small / "notes.txt").symlink_to(tmp_path / "secret")
    (small / "again.json").symlink_to(small / "config.json")
    assert "notes.txt" not in finished(small) and "again.json" in finished(small)


def test_a_dry_run_names_the_files_and_asks_nobody(small, hub):
    result = run("push", small, "me/m", "--dry-run")
    assert "model.safetensors" in result.stderr and "would upload" in result.stderr
    assert result.stdout == "me/m\n" and not hub.asked


def test_the_command_prints_the_commit(small, hub):
    assert run("push", small, "me/m", "-q").stdout == "https://hub/me/m/commit/1\n"
    found = json.loads(run("push", small, "me/m", "--json", "--force").stdout)
    assert found["url"].endswith("commit/1") and found["bytes"] == sum(found["files"].values())
    assert "hf_secret" not in json.dumps(found)


def test_from_python(small, hub):
    assert optin_cli.push(small, "me/m", revision="b").repo == "me/m"
    assert hub.uploads[0]["revision"] == "b"
