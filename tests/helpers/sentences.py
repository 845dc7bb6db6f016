"""Models as sentence-transformers lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.models import copy_of, saved_model


def folder_of(
    folder: Path, settings: dict[str, Any], where: str = "1_Pooling", others: tuple[str, ...] = ()
) -> Path:
    """A tiny BERT with the files of sentence-transformers: `settings` of the pooling, `others` behind it."""
    copy_of(saved_model("bert", "encoder"), folder)
    kinds = [
        ("", "Transformer"),
        (where, "Pooling"),
        *((f"{n + 2}_{kind}", kind) for n, kind in enumerate(others)),
    ]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / where).mkdir()
    (folder / where / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **settings}))
    return folder
