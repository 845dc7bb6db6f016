"""Libraries that take seconds to import, imported by the test that needs them instead of by whoever collects tests."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


class Lazy:
    """Stands for the module `name`, and imports it when something is asked of it. Patch the module by its path."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(
            "_"
        ):  # pytest asks every name of a test file whether it is a mock or wraps one
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def needs_onnx() -> None:
    """Skip a test file where the extra `onnx` is not installed, and import nothing of it where it is."""
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        pytest.skip("needs the extra onnx", allow_module_level=True)
