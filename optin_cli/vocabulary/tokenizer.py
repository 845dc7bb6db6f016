"""A tokenizer of transformers with another `tokenizer.json`, and the files of older layouts that go with it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optin_cli.loading.checkpoint import OpenModel

_FILE = "tokenizer.json"
_LEGACY = {"WordPiece": ("vocab.txt",), "BPE": ("vocab.json", "merges.txt")}
"""Kind of tokenizer -> the files that its model saves, which programs without `tokenizers` read."""
_TEXT_ALONE = "special_tokens_map.json"
"""Names tokens by their text, so that it stays right."""


def original_tokenizer(model: OpenModel) -> Any:
    """The tokenizer of a model as it is on disk, or as it was given: not set up for batches, as that of `processor` is.

    Raises `InputError` where there is none.
    """
    if model.given is not None:
        return copy.deepcopy(getattr(model.given, "tokenizer", model.given))
    used = model.processor  # what it raises says what is wrong with the files
    from transformers import AutoTokenizer

    assert model.source.folder is not None and used is not None
    return AutoTokenizer.from_pretrained(
        model.source.folder, config=model.module.config, trust_remote_code=model.source.trust_remote_code
    )


def rebuilt(tokenizer: Any, content: Mapping[str, Any]) -> Any:
    """The tokenizer with other `content` of its `tokenizer.json`, opened from files as any other is."""
    with TemporaryDirectory(prefix="optin-tokenizer-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for pattern in ("vocab*", "merges.txt", "added_tokens.json", "*.model"):
            for path in folder.glob(pattern):
                path.unlink()
        (folder / _FILE).write_text(json.dumps(content, ensure_ascii=False))
        made = type(tokenizer).from_pretrained(folder)
    made.name_or_path = getattr(tokenizer, "name_or_path", "")
    return made


def write_legacy_files(folder: Path, model: OpenModel, tokenizer: Any) -> list[str]:
    """Write the vocabulary in the older files that the model's directory has, too; returns those that can't be."""
    source = model.source.folder
    if source is None:
        return []
    backend = tokenizer.backend_tokenizer
    kind = json.loads(backend.to_str())["model"]["type"]
    names = _LEGACY.get(kind, ())
    if any((source / name).is_file() for name in names):
        backend.model.save(str(folder))
    if (source / _TEXT_ALONE).is_file():
        shutil.copyfile(source / _TEXT_ALONE, folder / _TEXT_ALONE)
    return sorted(path.name for path in source.glob("*.model"))
