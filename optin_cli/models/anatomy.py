"""The vocabulary of everything else: units stand in sites, sites in blocks, blocks in an anatomy.

Plain dataclasses without torch. An engine that works on these works on every architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from optin_cli.artefacts.schedule import tokens_by_block
from optin_cli.artefacts.shared import SharedLayer, overcounted

HEADS = "heads"
NEURONS = "neurons"
CHANNELS = "channels"

TEXT, IMAGE, AUDIO = "text", "image", "audio"
MODALITIES = (TEXT, IMAGE, AUDIO)
"""Which kind of data a model reads."""

TOKENS, SEQUENCE, NHWC, NCHW = "tokens", "sequence", "nhwc", "nchw"
LAYOUTS = (TOKENS, SEQUENCE, NHWC, NCHW)
"""Of hidden states: (batch, tokens, d), (tokens, batch, d), (batch, height, width, d) and (batch, d, height, width)."""

ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class Producer:
    """A Linear or Conv2d whose outputs hold the units of a site.

    `parts` groups are stacked along the output: a fused `qkv` projection has 3, each of units * width rows.
    """

    path: str
    parts: int = 1
    by_unit: bool = False
    """A unit's parts stand side by side, q k v of one head before those of the next (GPT-NeoX, DeBERTa)."""
    shared: bool = False
    """One slice for all heads of a group: the keys and values of grouped-query attention."""
    per_batch: bool = False
    """It runs once a batch, on relative positions: its MACs are no unit's."""
    width: int = 0
    """Rows of a unit in each part, where they are others than the consumer's columns: the sampling points of
    deformable attention. 0 where they are the same."""

    def rows_of(self, rows: int, group: int) -> int:
        """Rows of a unit in each part, where `rows` stand for its `group` heads."""
        return self.width or (rows // group if self.shared else rows)


@dataclass(frozen=True)
class UnitInput:
    """A forward argument of `module` that carries one slice for each unit along `axis`.

    MPNet adds a position bias of shape (batch, heads, s, s) that the encoder computes for all dense heads. A tensor
    without that axis, or of size 1 there, is the same for all units.
    """

    module: str
    argument: str
    axis: int
    returned: int = 0
    """Where in the tuple that the module returns it is given back for the next block, whole; 0 if it is not."""
    maker: str = ""
    """The method of `module` that makes it for all units, where it is not given and the module has what that takes:
    (queries, keys, device, past_seen_tokens), as T5's first block does for the others."""
    needs: str = ""
    """The attribute that says whether a module has that."""


@dataclass(frozen=True)
class RelativePositions:
    """Relative positions that each head multiplies its queries or keys with, as well as with each other."""

    kinds: str
    """The attribute that lists how: one product each."""
    rows: str = ""
    """The attribute that holds half the number of positions; by default there are twice as many as tokens."""


@dataclass(frozen=True)
class Bypass:
    """A `module` around a consumer that can't run without units: once all are gone, it gives the consumer's bias.

    What `module` returns is a tensor, or a tuple of `in_tuple` elements of which the others are None.
    """

    module: str
    in_tuple: int = 0
    cache: str = ""
    """Its argument that is a cache of the keys and values of its own tokens. The cache counts tokens, so it gets them
    without heads too."""
    attended: str = ""
    """Its argument with what it attends to, where that is not its own tokens: the cache is then of those."""
    empty: bool = False
    """The module stands in front of the consumer, and gives no features."""


@dataclass(frozen=True)
class Site:
    """One place that holds a row of interchangeable units between producers and a consumer."""

    name: str
    """`blocks.<block>.<its table's name>`: what `--protect` globs match and what artefacts use as key."""
    kind: str
    """`heads`, `neurons` or `channels`."""
    block: int
    """Where the consumer stands; in a chain the producer stands in an earlier block."""
    units: int
    """Units present now (fewer than in the dense model once pruned)."""
    width: int
    """Features of the consumer's input that belong to one unit: head_dim for heads, as a rule 1 for the others."""
    producers: tuple[Producer, ...]
    consumer: str
    group: int = 1
    """Heads in a unit: those that share keys and values."""
    spread: int = 1
    """Features of the consumer's input that stem from one output of a producer: the positions of a map that is
    flattened for a Linear."""
    carried: tuple[str, ...] = ()
    """Modules between producers and consumer that hold something for each unit: norms, depthwise convolutions."""
    readers: tuple[str, ...] = ()
    """Modules beside the consumer whose inputs are the units: a squeeze-and-excite's reduction."""
    masked_at: str = ""
    """The module whose input is masked, where something reads the units before the consumer does."""
    axis: int = -1
    """Where the units stand in what is masked, counted from the end: -3 in (examples, channels, height, width)."""
    batch_axis: int = 0
    """Where the examples stand in what is masked."""
    norm: str = ""
    """The BatchNorm right behind the consumer, whose bias stands for the one the consumer lacks."""
    counts: tuple[tuple[str, str], ...] = ()
    """Attributes that hold a count and change with the units: (module.attribute, 'units' or 'features')."""
    unit_inputs: tuple[UnitInput, ...] = ()
    tensors: tuple[tuple[str, int], ...] = ()
    """Parameters and buffers beside the producers with one slice a unit, or one a feature: (module.attribute, axis)."""
    bypass: Bypass | None = None
    macs_per_token: float = 0
    """MACs of one unit for each token of the first block: its rows of the producers and columns of the consumer.

    In a hierarchical model a site sees more or fewer positions than that, and attention stays within windows: both
    are folded into this number."""
    macs_per_pair: float = 0
    """MACs of one unit for each pair of tokens: 2 * head_dim for a head (scores and context); 0 if hierarchical."""
    params_per_unit: float = 0
    """Of a layer between two sites, each has half: never less than what goes when both lose units."""
    chained: bool = False
    """Nothing goes around its units: without them the output is the same for all inputs."""
    own_share: float = 1
    """Its MACs as a share of what goes when this site alone loses its units: less than 1 beside another site."""
    passed: tuple[int, ...] = ()
    """Blocks whose outputs are in no trajectory, because a mere norm, activation or pooling follows."""

    def macs_per_unit(self, tokens: float) -> float:
        """MACs one unit costs on a sequence of `tokens` tokens (METHOD section 4, PTF's FLOPs model)."""
        return self.macs_per_token * tokens + self.macs_per_pair * tokens * tokens

    @property
    def features(self) -> int:
        """Size of the consumer's input."""
        return self.units * self.width

    @property
    def rows(self) -> int:
        """Outputs of a part of a producer that belong to one unit."""
        return self.width // self.spread

    def rows_of(self, producer: Producer) -> int:
        """The same of a producer that may be shared by the heads of a group."""
        return producer.rows_of(self.rows, self.group)

    @property
    def entry(self) -> str:
        """The module whose input is masked."""
        return self.masked_at or self.consumer

    @property
    def label(self) -> str:
        """The name within the block."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class TokenSite:
    """The boundary behind a block, where tokens can be merged by the keys of the block's heads."""

    block: int
    heads: str
    """Name of the site of heads whose keys are compared."""
    keys: Producer
    """What gives the keys: all of its output, or part number `part` of a fused projection."""
    part: int
    attention: str
    """The module whose argument `bias` is added to the logits: (batch, 1, 1, tokens) of the tokens' log sizes."""
    bias: str


@dataclass(frozen=True)
class Stream:
    """Blocks that pass on the same hidden states: an encoder's, a decoder's."""

    first: int = 0
    """Its first block; the next stream's first block ends it."""
    layout: str = TOKENS
    """One of `LAYOUTS`."""
    mask: str = ATTENTION_MASK
    """The input of the model that tells which of its tokens are no padding, (batch, tokens)."""


@dataclass(frozen=True)
class Anatomy:
    """The ordered blocks of a model and the sites that stand in them. Paths are `get_submodule` paths.

    Blocks may share a module, which runs once for each: their sites stand in the first of them.
    """

    family: str
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    tokens: tuple[TokenSite, ...] = ()
    """One for each block, or none at all where tokens can't be merged."""
    prefix: int = 0
    """Tokens in front that are never merged: class token, registers."""
    streams: tuple[Stream, ...] = (Stream(),)
    """In order of depth."""
    chained: bool = True
    """Each block needs the hidden states of the one before and nothing else that changes with it. Where blocks need
    more (an encoder's output, an earlier stage's), whatever is run is the whole model."""
    shared: tuple[SharedLayer, ...] = ()
    """Layers between two sites."""

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def uses(self, block: int) -> int:
        """How many blocks share the module of one."""
        return self.blocks.count(self.blocks[block])

    def stream_of(self, block: int) -> Stream:
        """The stream that a block belongs to; negative numbers count from the last."""
        block %= len(self.blocks)
        return next(stream for stream in reversed(self.streams) if stream.first <= block)

    def fed_by(self, layer: str) -> Site | None:
        """The site whose units come out of the layer at this path."""
        return next((s for s in self.sites if any(p.path == layer for p in s.producers)), None)

    def read_by(self, layer: str) -> Site | None:
        """The site whose consumer the layer at this path is."""
        return next((s for s in self.sites if s.consumer == layer), None)

    def in_block(self, block: int) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.block == block)

    def macs(self, tokens: float, kept: Mapping[str, int] | None = None, merges: Sequence[int] = ()) -> float:
        """MACs of all sites on a sequence of `tokens` tokens, or of the `kept` number of units in each.

        `merges` says how many tokens are merged behind each block.
        """
        seen = tokens_by_block(tokens, len(self.blocks), merges, self.prefix)
        units = {site.name: site.units for site in self}
        kept = units if kept is None else kept
        total = sum(site.macs_per_unit(seen[site.block]) * kept[site.name] for site in self)
        return total - tokens * overcounted(self.shared, units, kept)[0]
