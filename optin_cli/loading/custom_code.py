"""Python code that comes in a model's directory, or by name from the hub: it runs only where the caller asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optin_cli.artefacts.kinds import load_json
from optin_cli.errors import InputError, param
from optin_cli.loading.sources import Source
from optin_cli.standalone.from_transformers import MODEL_TYPE

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def own_class(source: Source) -> str:
    """The class that the code in a directory defines for its model, as `module.Class`; '' for one of transformers.

    transformers' own classes come first: a model whose code was taken up there needs no other.
    Raises `InputError` where the directory's code is needed and not trusted, or a kernel of the hub is named.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    config = source.config
    _check_kernels(source)
    references = dict(_references(config.get("auto_map")))
    if (
        not references or config.get("model_type") == MODEL_TYPE
    ):  # a pruned directory's is optin's, which runs here
        return ""
    architecture = _architecture(config)
    known = config.get("model_type") in CONFIG_MAPPING
    if known and (not architecture or hasattr(transformers, architecture)):
        return ""
    found = next((ref for ref in references.values() if ref.rpartition(".")[2] == architecture), "")
    found = found or references.get("AutoModel", "") or next(iter(references.values()))
    if not source.trust_remote_code:
        raise untrusted(source.spec, architecture or found.rpartition(".")[2])
    return found


_PARTS = {
    "tokenizer": ("tokenizer_config.json", "tokenizer_class"),
    "image processor": ("preprocessor_config.json", "image_processor_type"),
    "feature extractor": ("preprocessor_config.json", "feature_extractor_type"),
}
"""Part of a model -> its file, and the entry that names its class."""


def check_part(folder: Path, part: str, trusted: bool) -> None:
    """Raise `InputError` where code in a directory that is not trusted defines the class of a part: transformers would
    ask, or take another class in silence."""
    import transformers

    file, entry = _PARTS[part]
    if trusted or not (folder / file).is_file():
        return
    content = load_json(folder / file)
    name = content.get(entry) if isinstance(content, dict) else None
    if isinstance(name, str) and content.get("auto_map") and not hasattr(transformers, name):
        raise untrusted(str(folder), f"the {part} {name}")


def class_of(reference: str, folder: Path) -> Any:
    """Import a class from the code in a directory. Only for trusted ones."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(folder))


def untrusted(spec: str, name: str) -> InputError:
    """The refusal to run code that nobody said to trust."""
    return InputError(
        f"{spec} needs {name}, which is no class of transformers: Python code in its directory defines it, and optin "
        "does not run that",
        f"if you trust the code, give {param('trust_remote_code', True)}",
    )


def _check_kernels(source: Source) -> None:
    """Raise `InputError` where a config names compiled code of the hub that transformers would fetch and run."""
    if source.trust_remote_code:
        return
    for name, value in _settings(source.config):
        if any(name.lstrip("_").startswith(known) for known in _IMPLEMENTATIONS) and "/" in value:
            raise InputError(
                f"config.json of {source.spec} names the kernel {value!r} of the hub as its {name}, and optin does not "
                "run that",
                f"take the entry out, or if you trust the kernel, give {param('trust_remote_code', True)}",
            )


def _settings(config: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a config, those of its parts too, with the name of the outermost setting that is about it."""
    if isinstance(config, dict):
        for key, value in config.items():
            about = name if any(known in name for known in _IMPLEMENTATIONS) else key
            yield from _settings(value, about)
    elif isinstance(config, str):
        yield name, config


def _references(auto_map: Any) -> Iterator[tuple[str, str]]:
    """(auto class, `module.Class`) of an `auto_map`; of a pair (slow and fast tokenizer) the last that is there."""
    if isinstance(auto_map, dict):
        for name, value in auto_map.items():
            several = value if isinstance(value, list) else [value]
            if texts := [one for one in several if isinstance(one, str)]:
                yield name, texts[-1]


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
