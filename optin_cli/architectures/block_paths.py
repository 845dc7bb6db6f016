"""Where the blocks of a model stand, and which streams they form."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from optin_cli.architectures.families import DOCS, Family
from optin_cli.errors import InputError, param
from optin_cli.structure.anatomy import Stream

BUILT_OTHERWISE = (
    "this variant is built otherwise than its table says; describe it in a FILE.yaml for "
    f"{param('family')}: {DOCS}"
)


def base_prefix(model: nn.Module) -> str:
    """What the paths within the base model (without the task head) start with: a path and a dot, or nothing."""
    base = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    return f"{prefix}." if prefix else ""


def find_streams(model: nn.Module, family: Family, prefix: str) -> tuple[list[str], list[Stream]]:
    """Paths of the blocks, in the order they run, and the streams that they form. Raises `InputError` without any."""
    blocks: list[str] = []
    streams: list[Stream] = []
    looked: list[str] = []
    for table in family.all_streams:
        patterns = [prefix + pattern for pattern in table.patterns]
        found = _repeated(model, family, _blocks(model, patterns))
        if found:
            streams.append(Stream(len(blocks), table.layout, table.mask))
        blocks += found
        looked += patterns
    if not blocks:
        raise InputError(
            f"family {family.name!r}: {type(model).__name__} has no blocks at "
            + " or ".join(f"{path} ({_deepest(model, path)})" for path in looked),
            BUILT_OTHERWISE,
        )
    return blocks, streams


def _deepest(model: nn.Module, pattern: str) -> str:
    """What there is of the way to a pattern: the last module that exists, and what it holds."""
    path, module = "", model
    for name in pattern.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            break
        path, module = f"{path}.{name}".lstrip("."), child
    held = ", ".join(name for name, _ in module.named_children()) or "nothing"
    return f"{path or 'the model'} is a {type(module).__name__} and holds {held}"


def _blocks(model: nn.Module, patterns: list[str]) -> list[str]:
    """Paths of the modules that match a pattern, as they are registered; plain paths in the order they are given."""
    found = [
        path
        for path, module in model.named_modules()
        if any(_matches(path, pattern) for pattern in patterns) and not isinstance(module, nn.Identity)
    ]
    if not any(set("*?[") & set(pattern) for pattern in patterns):
        found.sort(key=patterns.index)
    return found


def _repeated(model: nn.Module, family: Family, modules: list[str]) -> list[str]:
    """The module of each block, where modules run several times."""
    if not family.repeats:
        return modules
    depth = int(getattr(model.config, family.repeats))
    return [modules[block * len(modules) // depth] for block in range(depth)]


def _matches(path: str, pattern: str) -> bool:
    """True if every part of a dotted path matches the one of the pattern."""
    names, wanted = path.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(map(fnmatchcase, names, wanted))
