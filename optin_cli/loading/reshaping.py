"""A dense skeleton becomes the pruned model that a record describes, and remembers it in its config."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from optin_cli.architectures.families import Family
from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.pruned import PrunedRecord, parse_pruned, pruned_json
from optin_cli.loading.standalone_file import code_for
from optin_cli.standalone.from_transformers import remembering
from optin_cli.standalone.merging import Merging
from optin_cli.standalone.sizes import find, resize
from optin_cli.transforms.slicing import Footprint, slice_model
from optin_cli.transforms.token_merging import merging_options


def reshape_as_recorded(module: nn.Module, record: PrunedRecord, family: Family) -> None:
    """Resize `module` to what is left of it, as `modeling_optin.py` does; the record then names its modules.

    Raises `ValueError` for a record that does not fit the model, or itself.
    """
    dense = dissect(module, family, costs=False)
    for name, kept in record.kept.items():
        # of a config that was made smaller itself, indices count in the dense original all the same
        units = float("inf") if record.sized_config else dense[name].units
        if any(type(index) is not int or not 0 <= index < units for index in kept):
            raise ValueError(f"{name}: a kept index is not among the {dense[name].units} units")
    if record.resized:
        resize(module, asdict(record))
        record.resized = _moved(module, record)
    else:  # of an older version
        footprint = Footprint(module)
        slice_model(module, dense, record.kept)
        record.resized = footprint.changes()
    record.architecture = record.architecture if record.library != "transformers" else type(module).__name__
    anatomy = dissect(module, family, costs=False)
    record.resized["merging"] = merging_options(anatomy, record.merges) if any(record.merges) else None
    for site in anatomy:
        if site.units != len(record.kept.get(site.name, range(dense[site.name].units))):
            raise ValueError(
                f"{site.name} has {site.units} units, and {len(record.kept[site.name])} are kept"
            )


def _moved(module: nn.Module, record: PrunedRecord) -> dict[str, Any]:
    """The changes under the paths that `module` has, which may be of another class than was saved."""
    names = {id(part): path for path, part in module.named_modules()}
    resized, whole = record.resized, asdict(record)
    parts = {path: find(module, path, whole) for path in (*resized["sizes"], *resized["runs"])}
    moved = {path: names[id(part)] for path, part in parts.items() if part is not None}
    return {
        "sizes": {moved[path]: sizes for path, sizes in resized["sizes"].items() if path in moved},
        "runs": {moved[path]: runs for path, runs in resized["runs"].items() if path in moved},
    }


def remember(module: Any, record: PrunedRecord) -> None:
    """Let the config of a transformers model write what makes a directory open again, whoever saves the model.

    That of a model with code of its own stays as it is: its directory opens with optin and that code.
    """
    kind: Any = getattr(module.config, "dense_class", module.config.__class__)
    if all(of.__module__.startswith("transformers.") for of in (kind, type(module))):
        code = "" if record.is_stock else code_for(record.library, record.resized)
        module.config.__class__ = remembering(kind, pruned_json(record), code)


def recorded_in(module: nn.Module) -> PrunedRecord | None:
    """What a pruned model in memory remembers of how it came about, with paths of this module; None of any other."""
    text = getattr(getattr(module, "config", None), "pruned_record", None)
    if text is None:
        return None
    record = parse_pruned(text, f"what a {type(module).__name__} remembers")
    record.resized = {**_moved(module, record), "merging": record.resized["merging"]}
    record.architecture = type(module).__name__
    return record


def merging_in(module: nn.Module) -> Merging | None:
    """The token merging that a module runs with; None if it never merges."""
    hooks = (hook for part in module.modules() for hook in part._forward_hooks.values())
    found = (getattr(hook, "merging", None) for hook in hooks)
    # a directory opened without optin brings a class of its own, of the same source
    return next((one for one in found if type(one).__name__ == Merging.__name__), None)
