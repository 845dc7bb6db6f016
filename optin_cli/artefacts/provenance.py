"""Which software made an artefact."""

from __future__ import annotations

import platform
from importlib.metadata import version

_LIBRARIES = ("optin", "torch", "transformers", "timm", "datasets", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of Python, optin and the libraries that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
