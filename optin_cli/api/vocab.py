"""Keep the tokens that data needs."""

from __future__ import annotations

from pathlib import Path

from optin_cli.api.models import Data, Model, Progress, as_path, open_model, silent
from optin_cli.data.opening import as_data
from optin_cli.vocabulary import reduce as stage
from optin_cli.vocabulary.reduce import ReducedModel
from optin_cli.vocabulary.settings import VocabularySettings


def vocab(
    model: Model,
    data: Data,
    *,
    output: str | Path | None = None,
    keep: int | None = None,
    coverage: float | None = None,
    samples: int | None = None,
    split: str | None = None,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = silent,
) -> ReducedModel:
    """Keep the tokens that data needs, and drop the rows of all others from the embeddings. No training.

    Special tokens, bytes and single characters are always kept, so that any text can still be read: a word whose token
    is gone is split into smaller pieces. Text whose tokens are all kept gives the same outputs as before.

    Args:
        model: see `open_model`; of transformers, with a WordPiece, BPE or Unigram tokenizer. It stays as it is.
        data: see `score`: texts whose tokens are counted, whole ones.
        output: a directory to write, which transformers opens as it opened the model's own.
        keep: tokens of the new vocabulary: those that the data has most often, and where it has fewer, the first ones
            of the whole vocabulary.
        coverage: or the share of the data's tokens that are kept as they are; by default 1, all of them.
        samples: rows drawn by `seed`; by default all.
        split: of the data; by default `train`.
        seed: of the rows drawn.
        force: replace a model with fewer tokens at `output`.
        on_progress: called with (rows done, all rows, what is being done).

    Returns:
        The smaller model, open, to `prune` or to save; `report` has `tokens`, `covered`, `params` and `kept`, the old
        id of each token. With an `output` it is what was loaded back.

    Raises:
        UsageError: for fewer tokens than must be kept, and something else at `output`.
        InputError: for a tokenizer or a model that can't lose tokens, and data that can't be read.

    Example:
        >>> texts = ["a good film", "a bad film"]
        >>> smaller = optin.vocab(optin.open_model(bert, processor=tokenizer), texts)
        >>> smaller.report.tokens < smaller.report.dense_tokens
        True
        >>> smaller.module.config.vocab_size == smaller.report.tokens
        True
    """
    settings = VocabularySettings(keep, coverage, samples, seed)
    dense = open_model(model)
    path = as_path(output)
    if path is not None:
        stage.check_output(path, dense)
    batches = stage.open_counted(dense, as_data(data, split), settings)
    if path is not None and not force:
        found = stage.existing(path, dense, batches, settings)
        if found is not None:
            return stage.reopened(found, dense)
    return stage.reduce_vocabulary(dense, batches, settings, path, on_progress)
