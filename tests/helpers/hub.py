"""A hub of a test's own behind the hub's real client, at the level of HTTP. No test reaches a network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import huggingface_hub.utils._http
import pytest

# the hub's client has its own HTTP library, of one name or another
httpx = sys.modules[huggingface_hub.errors.HTTPError.__module__.partition(".")[0]]
_CLIENTS_OWN = ("/api/agent-harnesses", "/api/telemetry")
"""What the client asks by itself, once in a process, whoever is first to reach the hub."""


@contextmanager
def reached(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any], Any]) -> Iterator[None]:
    """Let `answer` stand for the hub: it gets each request that is made for a repository, and gives its response."""

    def answered(request: Any) -> Any:
        if request.url.path.startswith(_CLIENTS_OWN):
            return httpx.Response(404, json={}, request=request)
        return answer(request)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answered)))
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
