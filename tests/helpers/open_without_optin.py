"""Run without optin: opens every directory that test_without_optin.py wrote, and says what differs.

Usage: python open_all.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch


class NoOptin:
    """An import hook: optin is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optin_cli":
            raise ModuleNotFoundError(name)


def tensors(result) -> list[torch.Tensor]:
    """What a model gives, whatever its library."""
    found = [result] if isinstance(result, torch.Tensor) else result.to_tuple()
    return [value for value in found if isinstance(value, torch.Tensor)]


def auto_class(folder: Path):
    """The Auto class that gives the directory's own class; AutoModel where there is none."""
    import transformers

    data = json.loads((folder / "config.json").read_text())
    (own,), base = data["architectures"], transformers.CONFIG_MAPPING[data["base_model_type"]]
    for name in data["auto_map"]:
        if name.startswith("AutoModelFor"):
            found = getattr(transformers, name)._model_mapping[base]
            if own in [cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))]:
                return getattr(transformers, name)
    return transformers.AutoModel


def opened(folder: Path, library: str, stock: str = ""):
    """The model in a directory. stock: the Auto class that opens it without code of the directory's."""
    if stock:
        import transformers

        return getattr(transformers, stock).from_pretrained(folder)
    if library == "transformers":
        return auto_class(folder).from_pretrained(folder, trust_remote_code=True)
    sys.modules.pop("modeling_optin", None)
    sys.path.insert(0, str(folder))
    try:
        from modeling_optin import load

        return load(folder)
    finally:
        sys.path.remove(str(folder))


def differences(folder: Path, expected: dict) -> str:
    """What is not as expected in a directory; '' if all is."""
    model = opened(folder, expected["library"], expected.get("stock", ""))
    if type(model).__name__ != expected["class"] or model.training:
        return f"a {type(model).__name__}, training: {model.training}"
    if "ids" in expected:
        found = model.generate(**expected["prompt"], max_new_tokens=4, do_sample=False)
        if not torch.equal(found, expected["ids"]):
            return f"generates {found} instead of {expected['ids']}"
    found = tensors(model.double()(**expected["inputs"]))
    if len(found) != len(expected["outputs"]):
        return f"{len(found)} outputs"
    for ours, theirs in zip(found, expected["outputs"], strict=True):
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > 1e-9:
            return f"{ours.flatten()[:4]} instead of {theirs.flatten()[:4]}"
    return ""


def main(folder: Path) -> None:
    told = {}
    with torch.inference_mode():
        for saved in sorted(folder.iterdir()):
            if (saved / "expected.pt").is_file():
                told[saved.name] = differences(saved, torch.load(saved / "expected.pt"))
    print(json.dumps(told))


if __name__ == "__main__":
    sys.meta_path.insert(0, NoOptin())
    from helpers.vgg import register_vggs

    register_vggs()
    main(Path(sys.argv[1]))
