"""The vocabulary of everything else: an anatomy has blocks, a block has sites, a site has units.

Plain dataclasses without torch. An engine that works on these works on every architecture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from optin_cli.structure.coupled_layers import CoupledLayer, overcounted
from optin_cli.structure.fields import (
    ANY_PATH,
    ANY_TEXT,
    ARGUMENT,
    ATTRIBUTE,
    COUNT,
    OPTIONAL_ARGUMENT,
    OPTIONAL_ATTRIBUTE,
    OPTIONAL_PATH,
    PATH,
    PATHS,
    SIZE,
    TRUTH,
    WHOLE,
    Listed,
    Plain,
    Record,
    by_path,
    holds,
    one_of,
    shape,
)
from optin_cli.structure.merge_schedule import tokens_by_block
from optin_cli.structure.unit_costs import UnitCosts

HEADS = "heads"
NEURONS = "neurons"
CHANNELS = "channels"
DIMENSIONS = "dimensions"
"""Of all heads of a site, the same number of each: what a lower rank takes away."""
SUBLAYERS = "sublayers"
"""All heads of a site as one."""
BESIDE = (DIMENSIONS, SUBLAYERS)
"""Kinds of what is scored beside the units, and is a part of them or a whole."""

TEXT, IMAGE, AUDIO = "text", "image", "audio"
MODALITIES = (TEXT, IMAGE, AUDIO)
"""Kinds of data that models read."""

TOKENS, SEQUENCE, NHWC, NCHW = "tokens", "sequence", "nhwc", "nchw"
LAYOUTS = (TOKENS, SEQUENCE, NHWC, NCHW)
"""Of hidden states: (batch, tokens, d), (tokens, batch, d), (batch, height, width, d) and (batch, d, height, width)."""

ATTENTION_MASK = "attention_mask"


@dataclass(frozen=True)
class Producer:
    """A Linear or Conv2d whose outputs hold the units of a site."""

    path: str = field(metadata=holds(PATH))
    """The layer. A table may give this alone."""
    parts: int = field(default=1, metadata=holds(COUNT))
    """Groups that are stacked along the output: 3 in a fused `qkv` projection, each of units * width rows."""
    by_unit: bool = field(default=False, metadata=holds(TRUTH))
    """A unit's parts are next to each other, q k v of one head before those of the next (GPT-NeoX, DeBERTa)."""
    shared: bool = field(default=False, metadata=holds(TRUTH))
    """One slice for all heads of a group: the keys and values of grouped-query attention. Where query heads are units
    they stay until the last of those goes."""
    per_batch: bool = field(default=False, metadata=holds(TRUTH))
    """It runs once a batch, on relative positions: its MACs belong to no unit."""
    width: int = field(default=0, metadata=holds(SIZE))
    """Rows of a unit in each part, where they are not as many as the consumer's columns: the sampling points of
    deformable attention. 0 where they are."""

    def rows_of(self, rows: int, group: int) -> int:
        """Return the rows of a unit in each part; `rows` are those of its `group` heads."""
        return self.width or (rows // group if self.shared else rows)


@dataclass(frozen=True)
class UnitInput:
    """A forward argument of `module` that carries one slice for each unit along `axis`.

    MPNet adds a position bias of shape (batch, heads, s, s) that the encoder computes for all dense heads. A tensor
    without that axis, or of size 1 there, is the same for all units.
    """

    module: str = field(metadata=holds(PATH))
    """The module that takes it."""
    argument: str = field(metadata=holds(ARGUMENT))
    """Its name."""
    axis: int = field(metadata=holds(WHOLE))
    """The axis of the slices. Count from the end (-3) where leading axes come and go."""
    returned: int = field(default=0, metadata=holds(WHOLE))
    """Its index in the tuple that the module returns, if it is passed on to the next block whole; 0 if it is not."""
    maker: str = field(default="", metadata=holds(ANY_TEXT))
    """The method of `module` that makes it for all units, where it is not given and the module has what that takes:
    (queries, keys, device, past_seen_tokens), as T5's first block does for the others."""
    needs: str = field(default="", metadata=holds(ANY_TEXT))
    """The attribute of `module` that says whether it has that."""
    table: str = field(default="", metadata=holds(OPTIONAL_PATH))
    """The parameter that it is made from, a slice a unit along the last axis: of this block, or of an earlier one that
    makes it for several. A uniform model has it sliced, so that those blocks keep the same units."""


@dataclass(frozen=True)
class RelativePositions:
    """Relative positions that each head multiplies its queries or keys with, as well as with each other."""

    kinds: str = field(metadata=holds(ATTRIBUTE))
    """The attribute that lists how: one product each."""
    rows: str = field(default="", metadata=holds(OPTIONAL_ATTRIBUTE))
    """The attribute that holds half the number of positions; by default there are twice as many as tokens."""


@dataclass(frozen=True)
class Bypass:
    """A `module` around a consumer that can't run without units: once all are gone, it gives the consumer's bias.

    What `module` returns is a tensor, or a tuple of `in_tuple` elements of which the others are None.
    """

    module: str = field(metadata=holds(PATH))
    """The module around the consumer. Once all units are gone, it gives the consumer's bias."""
    in_tuple: int = field(default=0, metadata=holds(SIZE))
    """Size of the tuple that it returns, of which the others become None; 0 where it returns a tensor."""
    cache: str = field(default="", metadata=holds(OPTIONAL_ARGUMENT))
    """The argument with the cache of keys and values of the tokens it reads. The cache counts tokens, so it gets them
    without heads too."""
    attended: str = field(default="", metadata=holds(OPTIONAL_ARGUMENT))
    """The argument with what it attends to, if that is another sequence: the cache then belongs to that sequence."""
    empty: bool = field(default=False, metadata=holds(TRUTH))
    """The module is in front of the consumer, and gives no features."""


FIXED, BY_SIZE = "fixed", "by size"
SCALES = (FIXED, BY_SIZE)


@dataclass(frozen=True)
class Ranks:
    """The heads of a site can be cut to a lower rank: fewer dimensions each, the first ones of a rotated basis.

    Queries, keys and values are the first three producers, or parts of one. Nothing may come between them and their
    products that a rotation of a head's dimensions would change: no rotary positions, no norms.
    """

    scale: str = field(default=FIXED, metadata=holds(one_of(SCALES)))
    """What logits are multiplied by: `fixed` when the module is built, or computed `by size` of its heads as it runs.
    The weights of the queries then make up for what a lower rank changes."""
    must_be_identity: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    """Modules that would come in between when present: norms of queries and keys."""


UNIT_KIND = Plain(f"{HEADS}, {NEURONS} or {CHANNELS}", lambda value: value in (HEADS, NEURONS, CHANNELS))
PRODUCERS = Listed(f"a list of paths or {shape(Producer)}", Record(Producer, short="path"))
UNIT_INPUTS = Listed(f"a list of {shape(UnitInput)}", Record(UnitInput))
BYPASS = Record(Bypass, optional=True)
RANKS = Record(Ranks, optional=True)
COUNTS = by_path(
    "attribute: units, features, width or scale",
    lambda value: value in ("units", "features", "width", "scale"),
)
AXES = by_path("path: axis", lambda value: type(value) is int)
UNITS, ALL_HEADS, HEAD_WIDTH, RATIO = "units", "heads", "head_width", "ratio"
ENTRIES = Plain(
    f"entry of the config: {UNITS}, {ALL_HEADS}, {HEAD_WIDTH} or {RATIO}",
    lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(entry, str) and entry and what in (UNITS, ALL_HEADS, HEAD_WIDTH, RATIO)
            for entry, what in value.items()
        )
    ),
)


@dataclass(frozen=True)
class Site(UnitCosts):
    """One place in a model that holds interchangeable units between producers and a consumer.

    The heads of BERT's first block: the rows of three Linears make them, the columns of a fourth read them.

        >>> site = bert["blocks.0.heads"]
        >>> site.kind, site.units, site.width
        ('heads', 12, 64)
        >>> [producer.path for producer in site.producers]
        ['encoder.layer.0.attention.self.query',
         'encoder.layer.0.attention.self.key',
         'encoder.layer.0.attention.self.value']
        >>> site.consumer
        'encoder.layer.0.attention.output.dense'
        >>> site.counts["encoder.layer.0.attention.self.num_attention_heads"]
        'units'

    To remove head 3, delete rows 192 to 255 of each producer and columns 192 to 255 of the consumer, and write 11 into
    the attribute. That saves 4 * 64 * 768 MACs for each token and 2 * 64 for each pair of tokens.

        >>> site.macs_per_token, site.macs_per_pair
        (196608, 128)

    The channels between the two convolutions of ResNet-18's first block: one filter of the first convolution makes
    a channel, a BatchNorm on the way has a scale, a shift and statistics for it, and each filter of the second one
    reads it.

        >>> site = resnet["blocks.0.channels"]
        >>> site.units, site.producers[0].path, site.carried, site.consumer
        (64, 'layer1.0.conv1', ('layer1.0.bn1',), 'layer1.0.conv2')

    A `SiteTable` describes the same with paths from the block, which `dissect` resolves. Fields that both have mean
    the same, and are described there; here paths start from the model, and name only what is there.
    """

    name: str
    """`blocks.<block>.<its table's name>`: what `protect` globs match and what artefacts use as key."""
    kind: str = field(metadata=holds(UNIT_KIND))
    block: int
    """Index of the consumer's block; in a chain the producer is in an earlier block."""
    units: int
    """Units present now (fewer than in the dense model once pruned)."""
    width: int
    """Features of the consumer's input that belong to one unit: head_dim for heads, as a rule 1 for the others."""
    producers: tuple[Producer, ...] = field(metadata=holds(PRODUCERS))
    consumer: str = field(metadata=holds(ANY_PATH))
    group: int = 1
    """Heads in a unit: those that share keys and values."""
    one_group: bool = False
    """Its units are the query heads of a single head of keys and values, which stays until the last of them goes."""
    spread: int = 1
    """Features of the consumer's input that stem from one output of a producer: the positions of a map that is
    flattened for a Linear."""
    carried: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    readers: tuple[str, ...] = field(default=(), metadata=holds(PATHS))
    masked_at: str = field(default="", metadata=holds(OPTIONAL_PATH))
    axis: int = -1
    """The axis of the units in the masked tensor, counted from the end: -3 in (examples, channels, height, width)."""
    batch_axis: int = field(default=0, metadata=holds(SIZE))
    norm: str = field(default="", metadata=holds(OPTIONAL_PATH))
    counts: dict[str, str] = field(default_factory=dict, metadata=holds(COUNTS))
    unit_inputs: tuple[UnitInput, ...] = field(default=(), metadata=holds(UNIT_INPUTS))
    tensors: dict[str, int] = field(default_factory=dict, metadata=holds(AXES))
    bypass: Bypass | None = field(default=None, metadata=holds(BYPASS))
    ranks: Ranks | None = field(default=None, metadata=holds(RANKS))
    config: dict[str, str] = field(default_factory=dict, metadata=holds(ENTRIES))
    macs_per_token: float = 0
    """MACs of one unit for each token of the first block: its rows of the producers and columns of the consumer.

    In a hierarchical model a site sees more or fewer positions than that, and attention stays within windows: both
    are folded into this number."""
    macs_per_pair: float = 0
    """MACs of one unit for each pair of tokens: 2 * head_dim for a head (scores and context); 0 if hierarchical."""
    params_per_unit: float = 0
    """Of a layer between two sites, each has half: never less than what goes when both lose units."""
    base_macs_per_token: float = 0
    """MACs for each token that stay until the last unit goes: the keys and values of a single group."""
    base_params: float = 0
    """Parameters that stay until then."""
    chained: bool = False
    """Nothing goes around its units: without them the output is the same for all inputs."""
    own_share: float = 1
    """Its MACs as a share of what goes when this site alone loses its units: less than 1 beside another site."""
    rank: int = 0
    """Dimensions of each head that stay, the first ones, in a model that is to be cut to lower ranks; 0 for all."""
    passed: tuple[int, ...] = ()
    """Blocks whose outputs are in no trajectory, because a mere norm, activation or pooling follows."""

    @property
    def features(self) -> int:
        """Size of the consumer's input."""
        return self.units * self.width

    @property
    def rows(self) -> int:
        """Outputs of a part of a producer that belong to one unit."""
        return self.width // self.spread

    def rows_of(self, producer: Producer) -> int:
        """The same of a producer that may be shared by the heads of a group; of what all units share, all its rows."""
        return producer.rows_of(self.rows, self.group)

    def is_base(self, producer: Producer) -> bool:
        """Return whether all units share what a producer makes, so that it stays whole until the last one goes."""
        return self.one_group and producer.shared

    @property
    def kept_width(self) -> int:
        """Features of a unit that stay."""
        return self.rank or self.width

    @property
    def attended(self) -> tuple[tuple[Producer, int], ...]:
        """What gives queries, keys and values: (the layer, the part of it) of each."""
        parts = [(producer, part) for producer in self.producers for part in range(producer.parts)]
        return tuple(parts[:3])

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
    """The layer that gives the keys: all of its output, or part number `part` of a fused projection."""
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
    """The model input that marks real tokens, as opposed to padding: (batch, tokens)."""
    config: str = ""
    """What the names of its sites' config entries begin with."""


@dataclass(frozen=True)
class Anatomy:
    """The ordered blocks of a model and the sites in them. Paths are `get_submodule` paths.

    Blocks may share a module, which runs once for each: their sites are in the first of them.
    """

    family: str
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    token_sites: tuple[TokenSite, ...] = ()
    """One for each block, or none at all where tokens can't be merged."""
    prefix: int = 0
    """Tokens in front that are never merged: class token, registers."""
    streams: tuple[Stream, ...] = (Stream(),)
    """In order of depth."""
    chained: bool = True
    """Each block needs the hidden states of the one before and nothing else that changes with it. Where blocks need
    more (an encoder's output, an earlier stage's), whatever is run is the whole model."""
    coupled: tuple[CoupledLayer, ...] = ()
    """Layers between two sites."""

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def uses(self, block: int) -> int:
        """Return how many blocks share the module of `block`."""
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

    def with_dimensions(self) -> Anatomy:
        """The same with a further site behind all others for the dimensions of each site of heads that can be cut to
        a lower rank: a unit is one dimension of every head."""
        heads = [site for site in self.sites if site.ranks and site.units and site.width > 1]
        found = (
            replace(s, name=f"{s.name}.{DIMENSIONS}", kind=DIMENSIONS, units=s.width, width=s.units)
            for s in heads
        )
        return replace(self, sites=(*self.sites, *found))

    def with_sublayers(self, names: Collection[str]) -> Anatomy:
        """The same with a further site behind all others for each of those sites of heads: all of them are its unit."""
        found = (
            replace(s, name=f"{s.name}.{SUBLAYERS}", kind=SUBLAYERS, units=1, width=s.features)
            for s in self.sites
            if s.name in names
        )
        return replace(self, sites=(*self.sites, *found))

    def cut(self, ranks: Mapping[str, int]) -> Anatomy:
        """The same with the heads of some sites at lower ranks: site name -> dimensions of a head that stay."""
        return replace(self, sites=tuple(replace(site, rank=ranks.get(site.name, 0)) for site in self.sites))

    def in_block(self, block: int) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.block == block)

    def macs(self, tokens: float, kept: Mapping[str, int] | None = None, merges: Sequence[int] = ()) -> float:
        """MACs of all sites on a sequence of `tokens` tokens, or of the `kept` number of units in each.

        `merges` says how many tokens are merged behind each block.
        """
        seen = tokens_by_block(tokens, len(self.blocks), merges, self.prefix)
        units = {site.name: site.units for site in self}
        kept = units if kept is None else kept
        total = sum(site.macs(seen[site.block], kept[site.name]) for site in self)
        return total - tokens * overcounted(self.coupled, units, kept)[0]
