"""What is prunable in each architecture: one table of module paths a family, and nothing else.

A table is data. `register_family` adds one from Python, `--anatomy FILE.yaml` from the command line, and a
pruned directory carries its own, so that it loads on a machine that never saw the registration.
See docs/families.md for how to write one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optin_cli.errors import UsageError
from optin_cli.models.anatomy import HEADS, NEURONS, Producer, UnitInput

DOCS = "docs/families.md"


@dataclass(frozen=True)
class SiteTable:
    """Where a site stands inside a block. All paths are relative to the block."""

    kind: str
    """`heads` or `neurons`."""
    producers: tuple[Producer, ...]
    """The Linears whose output rows are the units."""
    consumer: str
    """The Linear whose input columns are the units."""
    unit_width: str | int = 1
    """Features of one unit: a number, or the attribute that holds it (`attn.head_dim`)."""
    counts: dict[str, str] = field(default_factory=dict)
    """Attributes to rewrite after slicing: path -> 'units' (a count) or 'features' (units * width)."""
    unit_inputs: tuple[UnitInput, ...] = ()
    """Forward arguments with one slice a unit, computed outside the block."""
    must_be_identity: tuple[str, ...] = ()
    """Modules that mix units when present (a norm over all heads): the site is left out if one is there."""


@dataclass(frozen=True)
class Family:
    """One architecture: which models it fits, where the blocks are, and the sites of a block."""

    name: str
    matches: tuple[str, ...]
    """`config.model_type` of transformers models, or the class name of any other module."""
    blocks: str
    """Path of the list of blocks, from the base model (without the task head)."""
    sites: tuple[SiteTable, ...]
    modality: str = "text"
    """`text` or `image`: which kind of data the model reads."""
    note: str = ""


def _linears(*paths: str) -> tuple[Producer, ...]:
    return tuple(Producer(path) for path in paths)


_BERT_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.self.query", "attention.self.key", "attention.self.value"),
        consumer="attention.output.dense",
        unit_width="attention.self.attention_head_size",
        counts={"attention.self.num_attention_heads": "units", "attention.self.all_head_size": "features"},
    ),
    SiteTable(NEURONS, producers=_linears("intermediate.dense"), consumer="output.dense"),
)

_DISTILBERT_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        consumer="attention.out_lin",
        unit_width="attention.attention_head_size",
        counts={"attention.n_heads": "units", "attention.dim": "features"},
    ),
    SiteTable(NEURONS, producers=_linears("ffn.lin1"), consumer="ffn.lin2"),
)

_MPNET_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        consumer="attention.attn.o",
        unit_width="attention.attn.attention_head_size",
        counts={"attention.attn.num_attention_heads": "units", "attention.attn.all_head_size": "features"},
        unit_inputs=(UnitInput("attention.attn", "position_bias", axis=1),),
    ),
    _BERT_SITES[1],
)

_VIT_SITES = (
    SiteTable(
        HEADS,
        producers=_linears("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        consumer="attention.o_proj",
        unit_width="attention.head_dim",
        counts={"attention.num_attention_heads": "units"},
    ),
    SiteTable(NEURONS, producers=_linears("mlp.fc1"), consumer="mlp.fc2"),
)

_TIMM_VIT_SITES = (
    SiteTable(
        HEADS,
        producers=(Producer("attn.qkv", parts=3),),
        consumer="attn.proj",
        unit_width="attn.head_dim",
        counts={"attn.num_heads": "units", "attn.attn_dim": "features"},
        must_be_identity=("attn.norm", "attn.gate"),
    ),
    SiteTable(NEURONS, producers=_linears("mlp.fc1"), consumer="mlp.fc2", must_be_identity=("mlp.norm",)),
)

_REGISTRY: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add an architecture, or replace one of the same name.

    Raises `UsageError` when another family already claims one of its `matches`.
    """
    for other in _REGISTRY.values():
        clash = set(other.matches) & set(family.matches)
        if other.name != family.name and clash:
            raise UsageError(
                f"family {family.name!r} claims {', '.join(sorted(clash))}, which {other.name!r} has already",
                f"register it under the name {other.name!r} to replace that table",
            )
    _REGISTRY[family.name] = family


def known_families() -> list[Family]:
    """All registered families, by name."""
    return sorted(_REGISTRY.values(), key=lambda family: family.name)


def find_family(candidates: list[str]) -> Family | None:
    """The family that matches one of `candidates` (a model type, class names), or None."""
    return next(
        (family for key in candidates for family in _REGISTRY.values() if key in family.matches), None
    )


def family_to_dict(family: Family) -> dict[str, Any]:
    """A family as plain JSON or YAML data; `family_from_dict` reads it back."""
    return asdict(family)


def family_from_dict(data: dict[str, Any], where: str = "family table") -> Family:
    """Read a family from plain data. A producer is a path or `{path, parts}`; `where` names the source in errors.

    Raises `UsageError` naming every field that is missing, unknown or of the wrong kind.
    """
    problems = _mistyped(data, _FAMILY_FIELDS, "")
    for number, site in enumerate(data["sites"] if isinstance(data.get("sites"), list | tuple) else ()):
        problems += _mistyped(site, _SITE_FIELDS, f"sites[{number}].")
    if problems:
        raise UsageError(
            f"{where} is not a family table: {'; '.join(problems)}", f"{DOCS} shows a complete table"
        )
    sites = tuple(
        SiteTable(
            **{
                **site,
                "producers": tuple(
                    Producer(**p) if isinstance(p, dict) else Producer(p) for p in site["producers"]
                ),
                "unit_inputs": tuple(UnitInput(**u) for u in site.get("unit_inputs", ())),
                "must_be_identity": tuple(site.get("must_be_identity", ())),
            }
        )
        for site in data["sites"]
    )
    return Family(**{**data, "matches": tuple(data["matches"]), "sites": sites})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(check(item) for item in value)


def _is_producer(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            set(value) <= {"path", "parts"}
            and _is_text(value.get("path"))
            and _is_count(value.get("parts", 1))
        )
    return _is_text(value)


def _is_unit_input(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"module", "argument", "axis"}
        and _is_text(value["module"])
        and _is_text(value["argument"])
        and type(value["axis"]) is int
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(k) and v in ("units", "features") for k, v in value.items()
    )


# field -> (required, what it must be, check)
_Fields = dict[str, tuple[bool, str, Callable[[Any], bool]]]
_FAMILY_FIELDS: _Fields = {
    "name": (True, "a name", _is_text),
    "matches": (True, "a list of names", _list_of(_is_text)),
    "blocks": (True, "a path", _is_text),
    "sites": (True, "a list of sites", lambda v: _list_of(lambda s: isinstance(s, dict))(v) and bool(v)),
    "modality": (False, "text or image", lambda v: v in ("text", "image")),
    "note": (False, "text", lambda v: isinstance(v, str)),
}
_SITE_FIELDS: _Fields = {
    "kind": (True, f"{HEADS} or {NEURONS}", lambda v: v in (HEADS, NEURONS)),
    "producers": (True, "a list of paths or {path, parts}", lambda v: _list_of(_is_producer)(v) and bool(v)),
    "consumer": (True, "a path", _is_text),
    "unit_width": (False, "a number above 0 or an attribute", lambda v: _is_text(v) or _is_count(v)),
    "counts": (False, "attribute: units or features", _is_counts),
    "unit_inputs": (False, "a list of {module, argument, axis}", _list_of(_is_unit_input)),
    "must_be_identity": (False, "a list of paths", _list_of(_is_text)),
}


def _mistyped(data: Any, known: _Fields, prefix: str) -> list[str]:
    if not isinstance(data, dict):
        return [f"{prefix or 'it'} is no mapping"]
    problems = [f"unknown field {prefix}{name}" for name in data if name not in known]
    for name, (required, kind, check) in known.items():
        if name not in data:
            problems += [f"{prefix}{name} is missing"] if required else []
        elif not check(data[name]):
            problems.append(f"{prefix}{name} must be {kind}, not {data[name]!r}")
    return problems


def read_family(path: Path) -> Family:
    """Read a family table from a YAML (or JSON) file."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"can't read the anatomy file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}", f"{DOCS} shows a complete table") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no table", f"{DOCS} shows a complete table")
    return family_from_dict(data, str(path))


for _family in (
    Family("bert", ("bert",), "encoder.layer", _BERT_SITES),
    Family("roberta", ("roberta", "xlm-roberta", "camembert"), "encoder.layer", _BERT_SITES),
    Family("electra", ("electra",), "encoder.layer", _BERT_SITES),
    Family("distilbert", ("distilbert",), "transformer.layer", _DISTILBERT_SITES),
    Family("mpnet", ("mpnet",), "encoder.layer", _MPNET_SITES, note="position bias sliced with the heads"),
    Family("vit", ("vit", "deit"), "layers", _VIT_SITES, modality="image"),
    Family(
        "timm-vit",
        ("VisionTransformer", "VisionTransformerDistilled"),
        "blocks",
        _TIMM_VIT_SITES,
        modality="image",
        note="fused qkv",
    ),
):
    register_family(_family)
