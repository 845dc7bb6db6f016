"""optin: make a pretrained transformer smaller and faster without retraining it.

The command line is the front door (`optin --help`). From Python::

    import optin_cli

    model = optin_cli.load("m-60/")      # a pruned directory: a ready torch module
    optin_cli.register_family(...)       # teach optin a new architecture (docs/anatomy.md)

Importing this package does not import torch; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Family", "SiteTable", "TokenTable", "__version__", "load", "register_family"]

if TYPE_CHECKING:
    from optin_cli.models.checkpoint import load
    from optin_cli.models.families import Family, SiteTable, TokenTable, register_family

_HOMES = {
    "load": "optin_cli.models.checkpoint",
    "register_family": "optin_cli.models.families",
    "Family": "optin_cli.models.families",
    "SiteTable": "optin_cli.models.families",
    "TokenTable": "optin_cli.models.families",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optin_cli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
