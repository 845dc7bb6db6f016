"""`vocab`: count the tokens of data, keep what it needs, rebuild tokenizer and weights, compare, write.

What was written is opened again and compared with the model that it was made from before it gets its final name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from optin_cli.artefacts.changes import changes, explain, explain_new
from optin_cli.artefacts.files import atomic_dir, check_replaceable, check_space
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.pruned import write_pruned
from optin_cli.artefacts.vocabulary import FILE_NAME, VocabularyRecord, read_vocabulary, write_vocabulary
from optin_cli.data.batches import Batches
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, OutputDiffers, param
from optin_cli.loading.checkpoint import OpenModel, open_like, save_open
from optin_cli.pruning.model_card import keep_edited, write_card
from optin_cli.structure.anatomy import TEXT
from optin_cli.vocabulary import checks
from optin_cli.vocabulary.choosing import choose
from optin_cli.vocabulary.counting import count_tokens, texts_of
from optin_cli.vocabulary.settings import VocabularySettings
from optin_cli.vocabulary.tokenizer import original_tokenizer, rebuilt, write_legacy_files
from optin_cli.vocabulary.tokens import Vocabulary, WordPiece, vocabulary_of
from optin_cli.vocabulary.weights import named_ids, vocabulary_size, with_tokens

log = logging.getLogger("optin")

Progress = Callable[[float, float, str], None]
_BATCH, _ROWS = 8, 32
"""Examples that outputs are compared on."""
_COMPARED = 10_000
"""Rows whose texts are split by both tokenizers."""
_UNSEEN = 0.01
"""Estimated share of unseen tokens from which on there is a warning."""
_FRONT = 16
"""Ids that classes of tokenizers and of models may count on, where special tokens are among them."""


@dataclass(frozen=True, repr=False)
class Reduced:
    """The result of `vocab`."""

    path: Path | None
    """The directory that it was written to; None for a model in memory alone."""
    record: VocabularyRecord
    """What `optin-vocab.json` holds."""
    itemsize: int
    """Bytes of a stored weight."""
    reused: bool = False

    def __repr__(self) -> str:
        """A line for a notebook: the kept ids would fill pages."""
        return (
            f"<Reduced: {self.tokens:,} of {self.dense_tokens:,} tokens, {self.params:,} of {self.dense_params:,} "
            f"parameters, {100 * self.covered:.3f} % of the data's tokens kept>"
        )

    @property
    def tokens(self) -> int:
        """Rows of the embedding."""
        return self.record.tokens

    @property
    def dense_tokens(self) -> int:
        """The same of the model it was made from."""
        return self.record.model["tokens"]

    @property
    def covered(self) -> float:
        """Share of the data's tokens that are kept, special ones not counted."""
        return self.record.covered

    @property
    def params(self) -> int:
        return self.record.params

    @property
    def dense_params(self) -> int:
        return self.record.model["params"]

    @property
    def deviation(self) -> float:
        """Largest absolute difference of the outputs from those before, on texts whose tokens are kept."""
        return self.record.deviation

    @property
    def kept(self) -> list[int]:
        """Old id of each token: the new id is the place in this list."""
        return self.record.kept


@dataclass(repr=False)
class ReducedModel(OpenModel):
    """A model with fewer tokens, ready to run, and how it came about."""

    report: Reduced = field(kw_only=True)


def check_output(output: Path, model: OpenModel) -> None:
    """Raise `UsageError` unless `output` can be written, and is free or made by `vocab` from another model."""
    check_replaceable(output, FILE_NAME, "`optin vocab`", "models with fewer tokens", model.source.folder)


def open_counted(model: OpenModel, data: DataSpec, settings: VocabularySettings) -> Batches:
    """The data whose tokens are counted. Raises `InputError` for a model that reads no text, and what reading does."""
    if model.family.modality != TEXT:
        raise InputError(
            f"{model.spec} reads no text, and tokens of what it reads are counted",
            "give a model of text",
        )
    return open_batches(data, model, settings.samples, _BATCH, settings.seed, at_most=True)


def existing(
    output: Path, model: OpenModel, batches: Batches, settings: VocabularySettings
) -> Reduced | None:
    """The model at `output` if it was made from the same inputs; None if nothing is there.

    Raises `OutputDiffers` when another one is there.
    """
    if not (output / FILE_NAME).is_file():
        explain_new(output)
        return None
    record = read_vocabulary(output)
    before, rows = record.model, batches.examples
    was = {"model": before["digest"], "task": before["task"], "data": record.data["fingerprint"]}
    now = {"model": model.digest, "task": model.task.name, "data": rows.fingerprint}
    was, now = was | record.settings, now | settings.identity()
    differing = changes(was, now)
    explain(output, differing, now)
    if differing:
        raise OutputDiffers(
            f"{output} exists, made with another {differing[0].name}",
            f"choose another name, or {param('force', True)} to replace it",
        )
    return Reduced(output, record, model.stored_dtype.itemsize, reused=True)


def reopened(reduced: Reduced, model: OpenModel) -> ReducedModel:
    """The model that `existing` found, opened as `model` was."""
    assert reduced.path is not None
    return _with_report(open_like(reduced.path, model), reduced)


def reduce_vocabulary(
    model: OpenModel,
    batches: Batches,
    settings: VocabularySettings,
    output: Path | None = None,
    on_progress: Progress = lambda *_: None,
) -> ReducedModel:
    """The model with the tokens that the data of `batches` needs; written to `output` if that is given.

    `model` stays as it is. Raises `UsageError` for a number of tokens that drops what must be kept, `InputError` for a
    tokenizer or a model that can't lose tokens, `OptinError` where outputs differ: nothing is written then.
    """
    tokenizer = original_tokenizer(model)
    vocabulary = vocabulary_of(tokenizer, model.spec)
    counts = _counted(model, tokenizer, batches, on_progress)
    on_progress(1, 1, "rebuilding tokenizer and weights")
    rows, always = vocabulary_size(model), _always(model, tokenizer, vocabulary)
    known = [one for one in vocabulary.ids if one < rows]
    choice = choose(counts, always, known, vocabulary.needed, settings)
    unseen = sum(count == 1 for count in counts.values()) / max(1, counts.total())
    if unseen > _UNSEEN and settings.keep is None:
        log.warning(
            "%s has too little text to know the words of its kind: count on more, or keep more tokens than it has",
            batches.examples.data.spec,
        )
    smaller_tokenizer = _checked(tokenizer, vocabulary, choice.kept, batches)
    made = with_tokens(model, choice.kept, smaller_tokenizer)
    record = VocabularyRecord(
        model={
            "id": model.spec,
            "digest": model.digest,
            "task": model.task.name,
            "tokens": rows,
            "params": _params(model),
        },
        data=batches.examples.describe(),
        settings=settings.identity(),
        kind=vocabulary.model["type"],
        kept=choice.kept,
        tokens=vocabulary_size(made),
        params=_params(made),
        always=len(always),
        counted=counts.total(),
        covered=choice.covered,
        unseen=unseen,
        deviation=0.0,
        checked_on=batches.examples.data.spec,
        versions=library_versions(),
    )
    inputs = checks.some_inputs(_short(batches))

    def compared(smaller: OpenModel) -> Reduced:
        deviation = checks.compare_models(model, smaller, choice.kept, inputs, counts).deviation
        return Reduced(output, replace(record, deviation=deviation), model.stored_dtype.itemsize)

    if output is None:
        return _with_report(made, compared(made))
    return _written(output, made, model, compared)


def _counted(model: OpenModel, tokenizer: Any, batches: Batches, on_progress: Progress) -> Counter[int]:
    """How often the data has each token, special ones left out. Raises `InputError` for one that has no row."""
    counts, rows = count_tokens(batches, on_progress), vocabulary_size(model)
    if beyond := [one for one in counts if one >= rows]:
        raise InputError(
            f"the data has token {beyond[0]}, and {model.spec} knows {rows} tokens",
            "take the tokenizer that belongs to the model",
        )
    for one in tokenizer.all_special_ids:
        counts.pop(one, None)
    return counts


def _always(model: OpenModel, tokenizer: Any, vocabulary: Vocabulary) -> set[int]:
    """Ids that are kept whatever the data has."""
    rows = vocabulary_size(model)
    named = {one for one in named_ids(model.module) if one < rows} | set(tokenizer.all_special_ids)
    return vocabulary.always() | named | in_front(named)


def _checked(tokenizer: Any, vocabulary: Vocabulary, kept: Sequence[int], batches: Batches) -> Any:
    """The tokenizer with the kept tokens, once it has split the data's texts as before."""
    ids = {old: new for new, old in enumerate(kept)}
    smaller = rebuilt(tokenizer, vocabulary.without(kept))
    checks.check_ids(tokenizer, smaller, ids)
    unknown = tokenizer.unk_token_id if isinstance(vocabulary, WordPiece) else None
    checks.check_texts(tokenizer, smaller, ids, texts_of(batches.examples, _COMPARED), unknown)
    return smaller


def _written(
    output: Path, made: OpenModel, model: OpenModel, compared: Callable[[OpenModel], Reduced]
) -> ReducedModel:
    """Write the model, and open it again and compare it before it gets its name."""
    check_space(output, _params(made) * model.stored_dtype.itemsize)
    with atomic_dir(output) as folder:
        save_open(folder, made, made.record)
        if left := write_legacy_files(folder, model, made.given):
            log.info("left out: %s, which holds the whole vocabulary", ", ".join(left))
        if made.record is not None:
            write_pruned(folder, made.record)
        loaded = open_like(folder, model)
        report = compared(loaded)
        checks.check_ids(
            made.given, original_tokenizer(loaded), {one: one for one in range(len(report.kept))}
        )
        write_vocabulary(folder, report.record)
        if made.record is not None:
            write_card(folder, made, made.record, output)
        else:
            keep_edited(folder, output)
    source = replace(loaded.source, spec=str(output), folder=output)
    return _with_report(replace(loaded, source=source), report)


def in_front(named: set[int]) -> set[int]:
    """Ids up to the last special one among the first of a vocabulary: some classes fix their numbers, and some models
    count positions from that of padding."""
    return set(range(max((one for one in named if one < _FRONT), default=-1) + 1))


def _short(batches: Batches) -> Batches:
    """A few of the examples, cut, in small batches; the caller's own batches as they are."""
    if batches.processor is None:
        return batches
    examples = batches.examples
    chosen = sorted({place * len(examples.rows) // _ROWS for place in range(_ROWS)})
    few = replace(
        examples, rows=examples.rows.select(chosen), row_ids=[examples.row_ids[place] for place in chosen]
    )
    return Batches(few, batches.processor, _BATCH, max_length=checks.LENGTH, reader=batches.reader)


def _params(model: OpenModel) -> int:
    return sum(p.numel() for p in model.module.parameters())


def _with_report(model: OpenModel, report: Reduced) -> ReducedModel:
    parts = {part.name: getattr(model, part.name) for part in fields(OpenModel)}
    return ReducedModel(**parts, report=report)
