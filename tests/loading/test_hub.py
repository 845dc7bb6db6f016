"""The hub behind its real client, at the level of HTTP: what passes is tried again, what does not is one message with
the local alternative. No test reaches a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.cli import run
from helpers.hub import httpx, reached
from huggingface_hub import constants

from optin_cli.data.sources import DataSpec, open_split
from optin_cli.errors import InputError
from optin_cli.loading.sources import resolve

FILES = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"weights" * 10_000}
COMMIT = "b" * 40
LOCAL = "download the model and give its directory"
Fault = Callable[[Any], Any]


class Half(httpx.SyncByteStream):
    """The body of an answer that breaks off."""

    def __init__(self, whole: bytes) -> None:
        self.whole = whole

    def __iter__(self) -> Iterator[bytes]:
        yield self.whole[: len(self.whole) // 2]
        raise httpx.RemoteProtocolError("peer closed connection")


class Hub:
    """A hub with one model, after as many faults as are listed."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.asked: list[str] = []

    def __call__(self, request: Any) -> Any:
        path = request.url.path
        self.asked.append(path)
        if self.faults and (found := self.faults[0](request)) is not None:
            del self.faults[0]
            if isinstance(found, Exception):
                raise found
            return found
        if path.startswith("/api/models/"):
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": "a" * 40}
                    for name, content in FILES.items()
                ]
                return httpx.Response(200, json=entries, request=request)
            siblings = [{"rfilename": name} for name in FILES]
            return httpx.Response(
                200, json={"id": "org/m", "sha": COMMIT, "siblings": siblings}, request=request
            )
        return self.file(request)

    @staticmethod
    def file(request: Any, stream: type[Half] | None = None) -> Any:
        name = request.url.path.rpartition("/")[2]
        content = FILES[name]
        start = int((request.headers.get("range") or "=0").partition("=")[2].partition("-")[0])
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content) - start)}
        if request.method == "HEAD":
            return httpx.Response(200, headers=headers, request=request)
        body = {"stream": stream(content[start:])} if stream else {"content": content[start:]}
        return httpx.Response(206 if start else 200, headers=headers, request=request, **body)


def timeout(request: Any) -> Any:
    return httpx.ConnectTimeout("slow")


def status(number: int, code: str = "") -> Fault:
    headers = {"X-Error-Code": code} if code else {}
    return lambda request: httpx.Response(number, headers=headers, json={}, request=request)


def half_a_file(request: Any) -> Any:
    wanted = request.method == "GET" and request.url.path.endswith("model.safetensors")
    return Hub.file(request, Half) if wanted else None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    answering = Hub()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with reached(monkeypatch, answering):
        yield answering


@pytest.fixture
def waited(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("fault", [timeout, status(503), status(429)], ids=["timeout", "503", "429"])
def test_what_passes_is_tried_again_with_longer_pauses(hub, waited, fault):
    hub.faults = [lambda request: fault(request) if len(waited) < 2 else None] * 100
    folder = resolve("org/m").folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert waited == [2, 4]


@pytest.mark.parametrize(
    ("fault", "says"),
    [(timeout, "ConnectTimeout: slow"), (status(503), "status 503"), (status(429), "status 429")],
    ids=["timeout", "503", "429"],
)
def test_a_hub_that_stays_away_is_one_message_with_the_local_way(hub, waited, fault, says):
    hub.faults = [fault] * 100
    told = run("bench", "org/m", code=1).stderr
    assert waited == [2, 4, 8]
    assert told.count("error:") == 1 and f"could not be reached in several tries ({says})" in told
    assert LOCAL in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (status(404, "RepoNotFound"), "it has none of that name, or a private one"),
        (status(401, "GatedRepo"), "it wants a token that may read it"),
        (status(403), "it wants a token that may read it"),
    ],
    ids=["404", "401", "403"],
)
def test_a_refusal_is_not_repeated(hub, waited, fault, says):
    hub.faults = [fault]
    with pytest.raises(InputError, match=says) as caught:
        resolve("org/m")
    assert LOCAL in str(caught.value) and "hf auth login" in str(caught.value)
    assert not waited and len(hub.asked) == 1


def test_half_a_file_is_fetched_to_its_end(hub, waited):
    hub.faults = [half_a_file]
    folder = resolve("org/m").folder
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_file_that_always_breaks_off_is_not_taken_for_whole(hub, waited, tmp_path):
    hub.faults = [half_a_file] * 1000
    with pytest.raises(InputError, match="peer closed connection") as caught:
        resolve("org/m")
    assert LOCAL in str(caught.value)
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (timeout, "could not be reached in several tries"),
        (status(503), r"could not be reached in several tries \(status 503\)"),
        (status(404, "RepoNotFound"), "doesn't exist"),
        (status(401, "GatedRepo"), "gated"),
    ],
    ids=["timeout", "503", "404", "401"],
)
def test_data_that_can_not_be_fetched_names_the_local_way(hub, waited, fault, says, monkeypatch, tmp_path):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.faults = [fault] * 100
    with pytest.raises(InputError, match=says) as caught:
        open_split(DataSpec("org/rows"))
    assert "give a local file or folder" in str(caught.value)
    assert bool(waited) == ("could not" in says)  # `datasets` tries again itself
