"""Opens the pruned model in this directory. It needs transformers, and not optin.

    AutoModelForSequenceClassification.from_pretrained("here", trust_remote_code=True)  # or another AutoModel
    from modeling_optin import load; model = load("here")

transformers builds the dense model, the code below cuts its layers to the sizes in optin.json, then weights are read.
It reads the files beside it, and `save_pretrained` writes them again.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from optin_cli.standalone.sizes import RECORD, check_sizes, merge_again, resize

CODE, MODEL_TYPE = "modeling_optin", "optin"
_SOURCE = Path(__file__).read_text()
_HUB = "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"


class OptinConfig:
    """Gives `AutoConfig` the config of the dense model, which remembers that this one is pruned."""

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        return read_config(path, _SOURCE, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Asked for by transformers. There is nothing to register."""


def read_config(path: Any, code: str, **kwargs: Any) -> Any:
    """The config in a directory or repository, with optin.json beside it, as `remembering` makes it."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    record = _file(path, RECORD, kwargs)
    if record is None:
        raise OSError(f"{path} is a pruned model without its {RECORD}: copy that file, too")
    data, kwargs = PreTrainedConfig.get_config_dict(path, **kwargs)
    base = CONFIG_MAPPING[data["base_model_type"]]
    data["model_type"] = data.pop("base_model_type")
    return remembering(base, Path(record).read_text(), code).from_dict(data, **kwargs)


def _file(path: Any, name: str, hub: dict[str, Any]) -> Any:
    """A file of a directory or of a repository on the hub; None where there is none of that name."""
    if Path(path).is_dir():
        found = Path(path, hub.get("subfolder") or "", name)
        return found if found.is_file() else None
    from transformers.utils import cached_file

    options = {key: hub[key] for key in _HUB if key in hub}
    return cached_file(path, name, **options, _raise_exceptions_for_missing_entries=False)


@functools.cache
def remembering(base: Any, record: str, code: str) -> Any:
    """The config class `base` of a pruned model: beside config.json it writes optin.json and this file."""

    class Config(base):
        dense_class, pruned_record, pruned_code = base, record, code

        def to_json_file(self, path: Any, use_diff: bool = True) -> None:
            data = json.loads(self.to_json_string(use_diff))
            Path(path).with_name(RECORD).write_text(record)
            if not code:  # the config has the sizes: nothing is needed to open it
                Path(path).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
                return
            data |= {"model_type": MODEL_TYPE, "base_model_type": base.model_type, "auto_map": auto_map(base)}
            Path(path).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
            Path(path).with_name(f"{CODE}.py").write_text(code)

        def __reduce__(self) -> Any:  # for copies and pickles
            return _blank, (base, record, code), self.__dict__

    Config.__name__, Config.__qualname__, Config.__module__ = base.__name__, base.__name__, base.__module__
    return Config


def _blank(*of: Any) -> Any:
    return remembering(*of).__new__(remembering(*of))


def _knows(auto: Any, base: Any) -> bool:
    return auto._model_mapping is not None and base in auto._model_mapping


def auto_map(base: Any) -> dict[str, str]:
    """What `trust_remote_code` runs for each Auto class that knows the dense model."""
    autos = vars(importlib.import_module("transformers.models.auto.modeling_auto"))
    known = [n for n, c in autos.items() if n.startswith("AutoModel") and _knows(c, base)]
    return {"AutoConfig": f"{CODE}.OptinConfig", **{name: f"{CODE}.{name}" for name in sorted(known)}}


def __getattr__(name: str) -> Any:
    """`modeling_optin.AutoModelFor..` of `auto_map`."""
    if not name.startswith("AutoModel"):
        raise AttributeError(name)
    return type(name, (Opener,), {})


class Opener:
    """An Auto class of transformers that gives the pruned model."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        record = json.loads(config.pruned_record)
        check_sizes(record, lambda name: _file(path, name, kwargs))
        dense = _dense_class(cls.__name__, config, record)
        return build(dense, record, "from_pretrained", path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        record = json.loads(config.pruned_record)
        return build(_dense_class(cls.__name__, config, record), record, "_from_config", config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Asked for by transformers. There is nothing to register."""


def _dense_class(auto: str, config: Any, record: Any) -> Any:
    """The class that an Auto class gives for the dense model. `AutoModel` opens what no other Auto class does."""
    transformers = importlib.import_module("transformers")

    def classes(name: str) -> tuple[Any, ...]:
        found = getattr(transformers, name)._model_mapping[config.dense_class]
        return found if isinstance(found, tuple) else (found,)

    own = getattr(transformers, record["architecture"], None)
    others = [name for name in auto_map(config.dense_class) if name.startswith("AutoModelFor")]
    if own in classes(auto) or (own and auto == "AutoModel" and not any(own in classes(n) for n in others)):
        return own
    return classes(auto)[0]


def build(cls: Any, record: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the dense class `cls` that gives a model: the pruned one."""
    built = getattr(resized(cls, lambda model: resize(model, record)), method)(*args, **kwargs)
    model = built[0] if isinstance(built, tuple) else built
    model.__class__ = cls
    merge_again(model, record)
    return built


def resized(cls: Any, change: Any) -> Any:
    """The class `cls` of transformers, whose models are changed right after construction: before they get weights."""

    class Resized(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            change(self)

    Resized.__name__, Resized.__module__ = cls.__name__, cls.__module__
    return Resized


def load(directory: Any) -> nn.Module:
    """The pruned model in a directory, of the class that was saved, in eval mode."""
    folder = Path(directory)
    record = json.loads((folder / RECORD).read_text())
    check_sizes(record, lambda name: _file(folder, name, {}))
    dense = getattr(importlib.import_module("transformers"), record["architecture"])
    return build(dense, record, "from_pretrained", folder, config=OptinConfig.from_pretrained(folder)).eval()
