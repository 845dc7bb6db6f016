"""Open and save models through transformers: its classes, key conversions, shards and dtypes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_cli.errors import InputError, UsageError, param
from optin_cli.loading.custom_code import class_of, own_class
from optin_cli.loading.processors import settle_image_size, settle_padding
from optin_cli.loading.sources import Source
from optin_cli.loading.weight_errors import other_shapes, stored_prefix
from optin_cli.standalone.from_transformers import MODEL_TYPE, RECORD, read_config, resized
from optin_cli.structure.anatomy import AUDIO
from optin_cli.tasks.base import Task
from optin_cli.tasks.embedding import EMBEDDING
from optin_cli.tasks.hidden_states import HIDDEN_STATES
from optin_cli.tasks.pooling import pools_sentences
from optin_cli.tasks.quiet import quiet_transformers
from optin_cli.tasks.registry import TASKS, task_from_config, task_of_class

log = logging.getLogger("optin")

Reshape = Callable[[nn.Module], None]


def open_transformers(
    source: Source,
    task_name: str | None,
    reshape: Reshape,
    device_map: str | dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, Task, torch.dtype]:
    """(module, task, dtype of the stored weights). In `dtype`, or as stored; over the devices of `device_map`."""

    assert source.folder is not None
    own = own_class(source)  # before transformers looks at the directory
    trusted = source.trust_remote_code
    config = _config(source, source.folder)
    asked = task_name or (source.record.task if source.record else None)
    task = task_from_config(config, source.folder, asked)
    if own:
        cls: Any = class_of(own, source.folder)
    else:
        cls = _class(config, task)
    if AUDIO not in getattr(cls, "input_modalities", ()):
        settle_image_size(source.folder, config, trusted)
    if source.untrained:
        return resized(cls, reshape)(config), task, torch.float32
    made = resized(cls, reshape)

    def load(**options: Any) -> tuple[Any, dict[str, Any]]:
        with quiet_transformers():
            return made.from_pretrained(
                source.folder, config=config, dtype=dtype or "auto", output_loading_info=True, weights_only=True,
                device_map=device_map, ignore_mismatched_sizes=True, **options,  # reported below, by name
            )  # fmt: skip

    module, info = load()
    if prefix := stored_prefix(info["missing_keys"], info["unexpected_keys"]):
        again, found = load(key_mapping={f"^{re.escape(prefix)}": ""})
        if len(found["missing_keys"]) < len(info["missing_keys"]):
            log.info("the weights of %s are stored under %r: they are read without it", source.spec, prefix)
            module, info = again, found
            # else they would be written with it again
            module._weight_conversions = module._weight_conversions[1:]
    if differing := sorted(info["mismatched_keys"]):
        raise InputError(
            f"the weights in {source.folder} do not fit its config.json: {other_shapes(differing)}",
            "config.json belongs to another model: copy the directory again, or save the model again",
        )
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        log.warning(
            "%s does not fit on the devices: layers wait in main memory or on disk, and are copied at every pass; "
            "gradients keep the copies of a pass until it ends",
            source.spec,
        )
    module.__class__ = cls
    if task.name == HIDDEN_STATES and asked is None:
        log.info(
            "no task covers the head of a %s: it is kept as it is, and the rest is scored on its hidden states",
            cls.__name__,
        )
    settle_padding(source.folder, module, trusted)
    # an embedding takes no notice of the pooler, so a checkpoint without one will do
    idle = [key for key in info["missing_keys"] if task.name == EMBEDDING and "pooler" in key]
    missing = sorted(set(info["missing_keys"]) - set(idle))
    if missing:
        raise InputError(
            f"{source.spec} has no weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}",
            _way_out(missing, module.base_model_prefix, task),
        )
    if unread := sorted(info["unexpected_keys"]):
        chosen = asked is not None or pools_sentences(source.folder)
        _left_out(source.spec, config, cls, unread, chosen)
    for key in idle:  # the same at every open, not freshly drawn
        torch.nn.init.zeros_(module.get_parameter(key))
    return module, task, module.dtype if dtype is None else getattr(config, "dtype", None) or dtype


def _class(config: Any, task: Task) -> Any:
    """The class to open: the one that the config names, unless it is for another task.

    Raises `UsageError` for a task that the architecture has no class for.
    """
    import transformers

    architecture = (config.architectures or [""])[0]
    named = getattr(transformers, architecture, None)
    two = getattr(config, "is_encoder_decoder", False)
    if named is not None and task_of_class(config).name == task.name and not (two and task.name == EMBEDDING):
        return named
    encoder = (two or architecture.endswith("EncoderModel")) and task.name == EMBEDDING
    # of an encoder and a decoder, an embedding takes the half that reads
    auto = getattr(transformers, "AutoModelForTextEncoding" if encoder else task.auto_class)
    cls = auto._model_mapping.get(type(config), None)
    if cls is None:
        able = [name for name, one in TASKS.items() if _can(config, one)]
        raise UsageError(
            f"a {config.model_type} model can't do {task.name}",
            f"choose another {param('task')}" + (f": {', '.join(able)}" if able else ""),
        )
    return cls


def _can(config: Any, task: type[Task]) -> bool:
    """Return whether transformers has a class of the architecture for a task of one kind of output."""
    import transformers

    if task.name in (EMBEDDING, HIDDEN_STATES):
        return False
    return type(config) in getattr(transformers, task.auto_class)._model_mapping


def _left_out(spec: str, config: Any, cls: type[Any], unread: list[str], chosen: bool) -> None:
    """Say which weights are not read. Raises `InputError` if nobody chose to leave a head out."""
    listed = f"{', '.join(unread[:3])}{', ..' if len(unread) > 3 else ''}"
    architecture = (config.architectures or [""])[0]
    if chosen or architecture == cls.__name__:
        log.warning(
            "%s is opened as a %s: %d weights are left out (%s)", spec, cls.__name__, len(unread), listed
        )
        return
    named = (
        f"names the architecture {architecture}, which transformers lacks"
        if architecture
        else "names no architecture"
    )
    raise InputError(
        f"config.json of {spec} {named}, and a {cls.__name__} would be without {len(unread)} weights: {listed}",
        f"say what the model does ({param('task', 'sequence-classification')} for instance; "
        f"{param('task', EMBEDDING)} leaves the head out), or name its class under architectures in config.json",
    )


def _way_out(missing: list[str], base: str, task: Task) -> str:
    """A head that was never trained is one thing, an encoder with gaps another."""
    heads = all(not key.startswith(f"{base}.") or "pooler" in key for key in missing)
    if heads and task.name != EMBEDDING:
        return f"the checkpoint has no trained head for {task.name}: choose another {param('task')}"
    return "the weights are incomplete, or config.json belongs to another model: copy the directory again"


def _config(source: Source, folder: Path) -> Any:
    """The config of the model, or of the dense original of a pruned one. Raises `InputError` for an incomplete copy."""
    import transformers

    if source.config.get("model_type") != MODEL_TYPE:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    if source.record is None:
        raise InputError(
            f"{folder} holds the weights of a pruned model without its {RECORD}",
            "copy that file from the directory that they were saved from, too",
        )
    return read_config(folder, "")


def save_transformers(folder: Path, module: Any) -> None:
    """config.json and safetensors, in shards where they are large."""
    with quiet_transformers():
        module.save_pretrained(folder)
