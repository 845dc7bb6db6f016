"""All runtimes by name. Adding one is a class in a file of this room and its entry here."""

from __future__ import annotations

from optin_cli.runtimes.targets import Target
from optin_cli.runtimes.to_onnx import OnnxTarget
from optin_cli.runtimes.to_openvino import OpenVinoTarget
from optin_cli.runtimes.to_torch import TorchTarget

TARGETS: dict[str, Target] = {
    target.name: target for target in (OnnxTarget(), OpenVinoTarget(), TorchTarget())
}
BY_SUFFIX = {target.suffix: target for target in TARGETS.values()}
