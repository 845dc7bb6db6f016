"""The schema of a family's table, in a YAML file, in Python and in the record of a pruned model.

Each field is described once, here or, of the records that sites share with it, in anatomy.py. Checks, reading, writing,
paths and the tables of docs/anatomy.md follow from that (fields.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optin_cli.structure.anatomy import (
    ATTENTION_MASK,
    AXES,
    BYPASS,
    COUNTS,
    ENTRIES,
    LAYOUTS,
    MODALITIES,
    PRODUCERS,
    RANKS,
    TOKENS,
    UNIT_INPUTS,
    UNIT_KIND,
    Bypass,
    Producer,
    Ranks,
    RelativePositions,
    UnitInput,
)
from optin_cli.structure.fields import (
    ANY_PATH,
    ANY_TEXT,
    ARGUMENT,
    NAME,
    OPTIONAL_ATTRIBUTE,
    OPTIONAL_PATH,
    PATH,
    PATHS,
    SIZE,
    TRUTH,
    DottedPath,
    Listed,
    Patterns,
    Plain,
    Record,
    holds,
    is_count,
    is_text,
    one_of,
)

LABEL = Plain("a word without dots", lambda value: isinstance(value, str) and "." not in value)
UNIT_WIDTH = DottedPath("a number above 0 or an attribute", lambda value: is_text(value) or is_count(value))
NAMES = Listed("a list of names", NAME)
BASE_ATTRIBUTES = Listed("a list of attributes", NAME)
CONFIG_ATTRIBUTE = Plain("an attribute of the config", lambda value: isinstance(value, str))
INPUT = Plain("the name of an input", is_text)
LAYOUT = one_of(LAYOUTS)
ARGUMENTS = Plain("argument: value", lambda value: isinstance(value, dict) and all(map(is_text, value)))


@dataclass(frozen=True)
class SiteTable:
    """The layers of a site, with paths from the block; `Site` shows two examples, resolved."""

    kind: str = field(metadata=holds(UNIT_KIND))
    """The kind of its units."""
    producers: tuple[Producer, ...] = field(default=(), metadata=holds(PRODUCERS, required=True))
    """The Linears or Conv2ds whose outputs are the units. Values come last: what is attended to has their number of
    positions. None in a chain without residuals: then it is the layer that runs before the consumer, in this block or
    an earlier one."""
    consumer: str = field(default="", metadata=holds(ANY_PATH, required=True))
    """The Linear or Conv2d whose inputs are the units; `""` is the block itself."""
    name: str = field(default="", metadata=holds(LABEL))
    """Name of the site within its block, if a block has several of one kind; by default the kind."""
    carried: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    """Modules between producers and consumer that hold something for each unit: norms, depthwise convolutions."""
    readers: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    """Modules beside the consumer whose inputs are the units: a squeeze-and-excite's reduction."""
    masked_at: str = field(default="", metadata=holds(OPTIONAL_PATH))
    """The module that first reads the units, where that is not the consumer: the squeeze-and-excite."""
    norm: str = field(default="", metadata=holds(OPTIONAL_PATH))
    """The BatchNorm right behind the consumer: its bias takes up what a consumer without one can't."""
    unit_width: str | int = field(default=1, metadata=holds(UNIT_WIDTH))
    """Features of one unit: a number, or the attribute that holds it (`attn.head_dim`)."""
    group: str = field(default="", metadata=holds(OPTIONAL_ATTRIBUTE))
    """The attribute that holds how many query heads share a head of keys and values. A unit is then a group of so many,
    each as wide as `unit_width` says, and the producers of keys and values are
    `{path: self_attn.k_proj, shared: true}`."""
    query_heads: bool = field(default=False, metadata=holds(TRUTH))
    """Where all query heads of every block share a single head of keys and values, each of them is a unit, and the
    attribute `group` is rewritten. Keys and values stay until the last one goes."""
    unit_count: str = field(default="", metadata=holds(OPTIONAL_ATTRIBUTE))
    """The attribute that holds the number of units, in place of `unit_width` where none holds their width."""
    counts: dict[str, str] = field(default_factory=dict, metadata=holds(COUNTS))
    """Attributes that hold a number and must be rewritten after slicing: `units`, `features` (units * width), `width`
    (of a unit), or `scale` (the root of 1 / width)."""
    config: dict[str, str] = field(default_factory=dict, metadata=holds(ENTRIES))
    """Entries of the config (of a timm model: arguments) from which the class itself builds layers of that size, the
    same in every block: `units`, `heads` (units * heads of a group), `head_width` (features of a head), or `ratio`
    (units for each output of the consumer). Empty where it can't: the site stays whole in a uniform model."""
    unit_inputs: tuple[UnitInput, ...] = field(default=(), metadata=holds(UNIT_INPUTS))
    """Forward arguments with one slice a unit, computed outside the block (MPNet's position bias)."""
    tensors: dict[str, int] = field(default_factory=dict, metadata=holds(AXES))
    """Parameters and buffers with one slice a unit, or one a feature of it, along an axis (Swin's table of relative
    positions)."""
    relative: RelativePositions | None = field(
        default=None, metadata=holds(Record(RelativePositions, optional=True))
    )
    """Relative positions that heads also attend to."""
    bypass: Bypass | None = field(default=None, metadata=holds(BYPASS))
    """A module that can't run without units, for when all are gone."""
    ranks: Ranks | None = field(default=None, metadata=holds(RANKS))
    """Of heads: that they can be cut to a lower rank, and how."""
    pairs: bool = field(default=True, metadata=holds(TRUTH))
    """Of heads: each position attends to every other, or to those of its window. Not in deformable attention."""
    batch_axis: int = field(default=0, metadata=holds(SIZE))
    """The axis of the examples in the masked tensor: 1 in (tokens, batch, features)."""
    must_be_identity: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    """Modules that mix units when present (a norm over all heads): the site is left out if one is there."""
    requires: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    """Modules or attributes that a block must have for this table to fit it. Of several tables of one name, a block
    takes the first that fits; where none does, that site is left out."""

    @property
    def label(self) -> str:
        """Name of the site within its block."""
        return self.name or self.kind


@dataclass(frozen=True)
class TokenTable:
    """The modules that token merging needs. The family's blocks must know positions by their content alone."""

    keys: str = field(metadata=holds(PATH))
    """One of the producers of the heads, relative to the block: what gives the keys."""
    attention: str = field(metadata=holds(PATH))
    """The attention module, relative to the block."""
    bias: str = field(metadata=holds(ARGUMENT))
    """Its argument that is added to the logits of the keys."""
    prefix: tuple[str, ...] = field(default=(), metadata=holds(BASE_ATTRIBUTES))
    """Attributes, relative to the base model, of tokens in front that are never merged: a number of them, or a
    parameter whose rows they are. A model need not have all of them."""
    part: int = field(default=0, metadata=holds(SIZE))
    """The part of a fused projection that holds the keys, counted from 0."""


@dataclass(frozen=True)
class StreamTable:
    """One of several lists of blocks."""

    blocks: str | tuple[str, ...] = field(metadata=holds(Patterns()))
    """As `blocks` of the family. A model need not have any, as long as another stream has some."""
    layout: str = field(default=TOKENS, metadata=holds(LAYOUT))
    """As `layout` of the family."""
    mask: str = field(default=ATTENTION_MASK, metadata=holds(INPUT))
    """The input of the model that says which tokens are not padding."""
    config: str = field(default="", metadata=holds(ANY_TEXT))
    """What the `config` entries of its sites begin with: `encoder_`."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the blocks' paths: the children of the list of blocks, if its path is given."""
        if not isinstance(self.blocks, str):
            return self.blocks
        return (self.blocks if "*" in self.blocks else f"{self.blocks}.*",)


@dataclass(frozen=True)
class Family:
    """One architecture: which models it fits, where the blocks are, and the sites of a block."""

    name: str = field(metadata=holds(NAME))
    """The name of the family."""
    matches: tuple[str, ...] = field(metadata=holds(NAMES))
    """`config.model_type` of transformers models, or the class name of any other module; `torchvision.ConvNeXt` is that
    library's class alone."""
    blocks: str | tuple[str, ...] = field(metadata=holds(Patterns(optional=True), required=False))
    """Path of the list of blocks, from the base model (without the task head); or patterns (`*` matches any part
    of a name), which all blocks match. The blocks run in the order in which their modules are registered, and each
    receives what the one before gives. None and Identity are not blocks."""
    sites: tuple[SiteTable, ...] = field(
        metadata=holds(Listed("a list of sites", Record(SiteTable), least=1))
    )
    """The sites of a block."""
    modality: str = field(default="text", metadata=holds(one_of(MODALITIES)))
    """The kind of data that the model reads."""
    note: str = field(default="", metadata=holds(ANY_TEXT))
    """A note that `optin families` prints beside it."""
    layout: str = field(default=TOKENS, metadata=holds(LAYOUT))
    """The layout of hidden states: `tokens` is (batch, tokens, d), `sequence` (tokens, batch, d), `nhwc` and `nchw`
    are maps."""
    hierarchical: bool = field(default=False, metadata=holds(TRUTH))
    """Blocks see different numbers of positions, or attend within windows: costs are counted by a forward."""
    tokens: TokenTable | None = field(default=None, metadata=holds(Record(TokenTable, optional=True)))
    """The modules that token merging needs (vision transformers); leave it out if tokens can't be merged."""
    repeats: str = field(default="", metadata=holds(CONFIG_ATTRIBUTE))
    """The attribute of the config with the number of blocks, where fewer modules share them: each runs as many times,
    one after the other (ALBERT)."""
    arguments: dict[str, Any] = field(default_factory=dict, metadata=holds(ARGUMENTS))
    """Arguments of the model beside its data: `{use_cache: false}` for a decoder, which is to fill no cache while it is
    measured."""
    streams: tuple[StreamTable, ...] = field(
        default=(), metadata=holds(Listed("a list of streams", Record(StreamTable)))
    )
    """In place of `blocks` and `layout`, where there are several lists of blocks: an encoder's and a decoder's. In
    order of depth: what a block computes changes nothing in those before."""
    thresholds: bool = field(default=False, metadata=holds(TRUTH))
    """Something inside is cut off at a threshold (a mask that attention is confined to): the sliced and the masked
    model are then compared in float64, where rounding puts nothing on the other side."""
    chained: bool = field(default=True, metadata=holds(TRUTH))
    """False where blocks need more than the hidden states of the one before. Several streams are never chained."""

    @property
    def all_streams(self) -> tuple[StreamTable, ...]:
        """Its lists of blocks: one, unless `streams` has more."""
        return self.streams or (StreamTable(self.blocks, self.layout),)


def linears(*paths: str) -> tuple[Producer, ...]:
    return tuple(Producer(path) for path in paths)
