"""README.md of a pruned directory: the model card that the hub shows, from what the record knows.

Names and paths come from other people's files: in the text they are escaped, of local paths only the last name is
shown. The last line has a digest of what is above it, so that a card that someone has edited is not written over.
"""

from __future__ import annotations

import html
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_cli.artefacts.files import atomic_file, digest_bytes
from optin_cli.artefacts.kinds import parse_yaml
from optin_cli.artefacts.pruned import PrunedRecord
from optin_cli.console import count, shown
from optin_cli.data.lengths import describe
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.selection.recorded import select_options
from optin_cli.tasks.pooling import sentence_modules
from optin_cli.tasks.registry import TASKS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

log = logging.getLogger("optin")

NAME = "README.md"
_MOST = 1 << 20
"""Bytes of the dense model's card that are read."""
_PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "image-classification": "image-classification",
    "audio-classification": "audio-classification",
    "language-modeling": "text-generation",
    "masked-language-modeling": "fill-mask",
    "speech-recognition": "automatic-speech-recognition",
    "text-to-text": "text2text-generation",
    "segmentation": "image-segmentation",
}
"""Task -> the hub's name of it. An embedding's depends on what it reads."""
_DEMOS = {"demo:minilm": "sentence-transformers/all-MiniLM-L6-v2"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,80}")
_DIGEST = re.compile(r"\n<!-- optin ([0-9a-f]{64}) -->\n\Z")
_PIECES = re.compile(r"([\\`*_{}\[\]()#+!|~$^-])")


# ---- writing ----


def write_card(folder: Path, model: OpenModel, record: PrunedRecord, output: Path) -> None:
    """Write the card of a pruned model into `folder`, which is to become `output`.

    A card that was edited there is kept in place of the new one, with a warning.
    """
    if keep_edited(folder, output):
        return
    name = shown(output.resolve().name)
    _write(folder / NAME, _front_matter(folder, model, record), _body(folder, model, record, name))


def keep_edited(folder: Path, output: Path) -> bool:
    """Take over an edited card of `output` into `folder`, which is to replace it. Returns whether there is one."""
    there = output / NAME
    if not there.is_file() or not is_edited(there):
        return False
    log.warning("%s was edited: it is kept, though the model is another one", there)
    (folder / NAME).write_bytes(there.read_bytes())
    return True


def add_results(folder: Path, evaluation: Mapping[str, Any], timings: Sequence[Mapping[str, Any]]) -> None:
    """Add what was measured to a card that nobody has edited: an `Evaluation` with its data, and `TimedPoint`s."""
    from huggingface_hub import EvalResult, ModelCard

    path = folder / NAME
    if not path.is_file() or is_edited(path):
        return
    card: Any = ModelCard(_DIGEST.sub("", path.read_text()))
    metrics, spec = evaluation.get("metrics", {}), str(evaluation.get("data", {}).get("spec", "data"))
    task = card.data.pipeline_tag or evaluation.get("task", "other")
    card.data.model_name = shown(folder.resolve().name)
    card.data.eval_results = [
        EvalResult(task, slug(public(spec)), public(spec), metric, value) for metric, value in metrics.items()
    ] or None
    text = card.text.partition("\n## Measured\n")[0].rstrip()
    _write(path, card.data, "\n".join([text, "", *_measured(evaluation, timings, public(spec))]))


def is_edited(path: Path) -> bool:
    """Return whether a card is not as optin wrote it."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return True
    found = _DIGEST.search(text)
    return found is None or found[1] != digest_bytes(text[: found.start()].encode())


def _write(path: Path, data: ModelCardData, body: str) -> None:
    text = f"---\n{data.to_yaml().strip()}\n---\n\n{body.strip()}\n"
    with atomic_file(path) as temporary:
        temporary.write_text(f"{text}\n<!-- optin {digest_bytes(text.encode())} -->\n")


# ---- front matter ----


def _front_matter(folder: Path, model: OpenModel, record: PrunedRecord) -> ModelCardData:
    from huggingface_hub import ModelCardData

    base = base_model(record.dense["id"], model)
    library = "sentence-transformers" if sentence_modules(folder) else record.library
    tags = ["optin", "pruning", "structured-pruning"]
    if not record.is_stock and record.library == "transformers":
        tags.append("custom_code")
    # the hub knows adapter, merge, quantized and finetune: these are other weights, and not the same in fewer bits
    relation: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    return ModelCardData(
        library_name=library if library != "torchvision" else None,
        pipeline_tag=_pipeline(model, record, sentences=library == "sentence-transformers"),
        tags=tags,
        **_licence(model),
        **relation,
    )


def base_model(spec: str, model: OpenModel) -> str | None:
    """The hub's name of the dense model; None of one that is only here."""
    if spec.startswith("timm:"):
        cfg = getattr(model.module, "pretrained_cfg", {})
        return f"timm/{spec.removeprefix('timm:')}" if cfg.get("tag") and "?" not in spec else None
    if spec in _DEMOS:
        return _DEMOS[spec]
    return spec if _HUB_ID.fullmatch(spec) and not Path(spec).exists() else None


def _pipeline(model: OpenModel, record: PrunedRecord, sentences: bool) -> str | None:
    if sentences:
        return "sentence-similarity"
    if record.task == "embedding":
        return {"text": "feature-extraction", "image": "image-feature-extraction"}.get(model.family.modality)
    return _PIPELINES.get(record.task)


def _licence(model: OpenModel) -> dict[str, Any]:
    """As the dense model's card or config states it."""
    folder = model.source.folder
    stated = _stated(folder / NAME) if folder and (folder / NAME).is_file() else {}
    if not stated.get("license"):
        cfg = getattr(model.module, "pretrained_cfg", None)
        stated = {
            "license": model.source.config.get("license") or (isinstance(cfg, dict) and cfg.get("license"))
        }
    if not (isinstance(stated.get("license"), str) and _LICENCE.fullmatch(stated["license"])):
        return {}
    wanted = ("license", "license_name", "license_link")
    return {name: stated[name] for name in wanted if isinstance(stated.get(name), str)}


def _stated(card: Path) -> dict[str, Any]:
    """The front matter of a card; nothing where it has none that can be read."""
    try:
        with card.open("rb") as stream:
            text = stream.read(_MOST).decode(errors="replace")
        _, front, _ = re.split(r"^---[ \t]*\r?$", text, maxsplit=2, flags=re.MULTILINE)
        found = parse_yaml(front)
    except (OSError, ValueError) as error:
        log.debug("%s has no front matter: %s", card, error)
        return {}
    return found if isinstance(found, dict) else {}


# ---- text ----


def _body(folder: Path, model: OpenModel, record: PrunedRecord, name: str) -> str:
    last = record.history[-1]
    reached, dense = last["reached"], record.dense
    share = reached["macs"] / reached["dense_macs"] if reached["dense_macs"] else 1.0
    params = sum(parameter.numel() for parameter in model.module.parameters())
    base = base_model(dense["id"], model)
    link = f"[{escaped(base)}](https://huggingface.co/{base})" if base else f"`{code(public(dense['id']))}`"
    lines = [
        f"# {escaped(name)}",
        "",
        f"{link}, made smaller by structured pruning with optin: whole attention heads, neurons or channels are removed"
        ", and what is left is refitted to the dense model without labels or training.",
        "",
        "## Size",
        "",
        "| | dense | this model |",
        "|---|---|---|",
        f"| parameters | {count(dense['params'])} | {count(params)} ({100 * params / dense['params']:.1f} %) |",
        f"| MACs of the prunable layers, {last['budget']['tokens']:.0f} tokens | {count(reached['dense_macs'])} | "
        f"{count(reached['macs'])} ({100 * share:.1f} %) |",
        "",
        *_blocks(model),
        "",
        "## How it was made",
        "",
        *_made(record, name),
        "",
        "## How to load it",
        "",
        *_loading(folder, model, record),
    ]
    return "\n".join(lines)


def _blocks(model: OpenModel) -> Iterator[str]:
    """What is left in each block."""
    labels = list(dict.fromkeys(site.label for site in model.anatomy))
    left = {(site.block, site.label): site.units * site.group for site in model.anatomy}
    yield f"| block | {' | '.join(map(escaped, labels))} |"
    yield f"|---|{'---|' * len(labels)}"
    for block in sorted({site.block for site in model.anatomy}):
        yield f"| {block} | {' | '.join(str(left.get((block, label), '')) for label in labels)} |"
    if model.merges and any(model.merges):
        yield ""
        yield f"It merges tokens behind each block: {', '.join(map(str, model.merges))}."


def _made(record: PrunedRecord, name: str) -> Iterator[str]:
    commands = []
    for number, step in enumerate(record.history):
        last = number == len(record.history) - 1
        commands.append(["optin", "select", "RANKING", *select_options(step["budget"]), "-o", "MASK"])
        model = public(record.dense["id"]) if number == 0 else "PREVIOUS"
        method = step.get("compensation", {}).get("method", "none")
        refit = [] if method == "auto" else ["--compensate", method]
        commands.append(["optin", "apply", model, "MASK", "-o", name if last else "NEXT", *refit])
    yield from fenced("sh", [shown(shlex.join(words)) for words in commands])
    last_step = record.history[-1]
    done = last_step.get("compensation", {})
    if done.get("method", "none") != "none":
        yield ""
        yield f"Refitted on {done['rows']} examples of `{code(public(done['data']['spec']))}`."
    lengths = last_step.get("lengths")
    for what, seen in (("scored", lengths["scored"]), ("refitted", lengths["refitted"])) if lengths else ():
        if seen:
            yield ""
            yield f"Texts it was {what} on: {describe(seen)}. Longer texts may lose more."
    yield ""
    yield f"Versions: {escaped(', '.join(f'{lib} {version}' for lib, version in last_step['versions'].items()))}."


def _loading(folder: Path, model: OpenModel, record: PrunedRecord) -> Iterator[str]:
    """With its library alone, and with optin."""
    if record.library == "transformers":
        trusted = "" if record.is_stock else ", trust_remote_code=True"
        if sentence_modules(folder):
            lines = [
                "from sentence_transformers import SentenceTransformer",
                "",
                f'model = SentenceTransformer("PATH_OR_ID"{trusted})',
            ]
        else:
            auto = TASKS[record.task].auto_class if record.task in TASKS else "AutoModel"
            lines = [
                f"from transformers import {auto}",
                "",
                f'model = {auto}.from_pretrained("PATH_OR_ID"{trusted})',
            ]
        yield (
            "Its layers are all of one size: it opens like any other model."
            if record.is_stock
            else (
                "Its layers have different sizes: the file `modeling_optin.py` beside the weights builds them."
            )
        )
    elif record.is_stock and record.library == "timm":
        lines = ["import timm", "", 'model = timm.create_model("local-dir:PATH", pretrained=True)']
        yield "Its layers are all of one size: it opens like any other model."
    else:
        lines = ["from modeling_optin import load  # a file of this directory", "", 'model = load("PATH")']
        yield "Its layers have different sizes: the file `modeling_optin.py` builds them."
    yield ""
    yield from fenced("python", lines)
    yield ""
    yield "With optin:"
    yield ""
    yield from fenced("python", ["import optin_cli", "", 'model = optin_cli.load("PATH_OR_ID")'])


def _measured(
    evaluation: Mapping[str, Any], timings: Sequence[Mapping[str, Any]], data: str
) -> Iterator[str]:
    yield "## Measured"
    yield ""
    baseline = evaluation.get("baseline_metrics", {})
    if metrics := evaluation.get("metrics", {}):
        yield f"On {evaluation['examples']} examples of `{code(data)}`:"
        yield ""
        yield "| | dense | this model |"
        yield "|---|---|---|"
        for metric, value in metrics.items():
            before = f"{baseline[metric]:.2f}" if metric in baseline else ""
            yield f"| {escaped(metric)} | {before} | {value:.2f} |"
        yield ""
    if timings:
        yield "| batch | size | dense ms | this model ms | speed-up | on |"
        yield "|---|---|---|---|---|---|"
        for one in timings:
            yield (
                f"| {one['batch_size']} | {one['size']} | {one['dense_ms']:.2f} | {one['ms']:.2f} | "
                f"{one['speedup']:.2f} | {escaped(one['device'])}, {one['threads']} threads, {escaped(one['dtype'])} |"
            )


# ---- other people's texts ----


def escaped(text: str) -> str:
    """A text as Markdown shows it, whatever is in it."""
    return _PIECES.sub(r"\\\1", html.escape(" ".join(shown(text).split()), quote=False))


def code(text: str) -> str:
    """A text between single backticks."""
    return " ".join(shown(text).split()).replace("`", "'")


def fenced(language: str, lines: Sequence[str]) -> list[str]:
    """Lines of code between fences that none of them can close."""
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *(line.replace("\n", " ") for line in lines), fence]


def public(spec: str) -> str:
    """A model or data set by name; of a local path its last part, as the rest is nobody's business."""
    local = Path(spec).expanduser()
    if spec.startswith(("/", ".", "~")) or spec.count("/") > 1 or "\\" in spec or local.exists():
        return local.resolve().name or spec
    return spec


def slug(text: str) -> str:
    """A name as the hub's tables want it."""
    return re.sub(r"[^\w./-]+", "-", text).strip("-") or "data"
