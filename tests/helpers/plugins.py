"""Packages of others, as pip leaves them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, group: str, entry: str) -> None:
    """A module `otherpackage`, and metadata with one entry point."""
    folder.mkdir(exist_ok=True)
    (folder / "otherpackage.py").write_text(code)
    metadata = folder / "otherpackage-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: otherpackage\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "otherpackage", raising=False)
