"""The software that made an artefact."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("optin", "torch", "transformers", "timm", "datasets", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of Python, optin and the libraries that results depend on; without those that are not installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that runs uninstalled, text models without timm
            continue
    return found
