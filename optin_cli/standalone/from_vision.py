"""Opens the pruned model in this directory. It needs timm or torchvision, whichever made it, and not optin.

    from modeling_optin import load; model = load("here")

The library builds the dense model, the code below cuts its layers to the sizes in optin.json, then weights are read.
It reads the files beside it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from optin_cli.standalone.sizes import RECORD, check_sizes, merge_again, resize

_LIBRARIES = {"timm": ("timm", "create_model"), "torchvision": ("torchvision.models", "get_model")}


def load(directory: Any) -> nn.Module:
    """The pruned model in a directory, in eval mode."""
    folder = Path(directory)
    record, config = (json.loads((folder / name).read_text()) for name in (RECORD, "config.json"))
    check_sizes(record, lambda name: folder / name if (folder / name).is_file() else None)
    args = config["model_args"] | {"num_classes": config["num_classes"]}
    if record["library"] == "torchvision" and not config["architecture"].startswith("vit_"):
        args.pop("image_size", None)  # the others take any
    home, maker = _LIBRARIES[record["library"]]
    model: nn.Module = getattr(importlib.import_module(home), maker)(config["architecture"], **args)
    resize(model, record)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    merge_again(model, record)
    return model.eval()
