"""Make a model smaller by a mask, in memory or on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from optin_cli.api.models import Data, Model, Progress, as_path, open_model, silent
from optin_cli.artefacts.mask import Mask, read_mask
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.data.opening import as_data
from optin_cli.errors import UsageError
from optin_cli.loading.from_module import copy_of, into_original
from optin_cli.pruning import apply as pruning
from optin_cli.pruning.apply import PrunedModel
from optin_cli.pruning.check import open_check
from optin_cli.pruning.writers import DIRECTORY, writer_of
from optin_cli.sizes import byte_count


def apply(
    model: Model,
    mask: Mask | str | Path,
    data: Data = None,
    *,
    output: str | Path | None = None,
    inplace: bool = False,
    compensate: str = "auto",
    producers: bool = True,
    readout: bool = True,
    bn: bool = False,
    samples: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    memory: int | str = "4GiB",
    split: str | None = None,
    format: str = DIRECTORY,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = silent,
) -> PrunedModel:
    """Slice the weights by a mask and refit what is left, so that it follows the dense model. No labels, no training.

    The refit is least squares on unlabelled examples, block by block, as in PTF's mask tuning and K-prune (Park et
    al., ICLR 2024). The sliced model is compared with the masked one before it is returned or written.

    Args:
        model: see `open_model`; the one that was scored.
        mask: of `select`, or its file.
        data: see `score`: what to refit and check on. By default more of the ranking's own data, where that has a
            name.
        output: a directory to write, which `load` and `open_model` read.
        inplace: prune the model that was given, instead of a copy of it.
        compensate: `auto` (what fits held-out examples best at each site), `none`, `bias`, `scale` or `full`.
        producers: refit the layers that make the units, too.
        readout: and what stands behind the last block: pooler, classifier, projection.
        bn: then measure the statistics of BatchNorms again, on the same examples.
        samples: examples to refit on; by default 2048, or what there is.
        batch_size, max_length: examples in a batch, and tokens of a text at most.
        memory: bytes of activations in main memory, or a size; the rest goes to disk.
        split: of the data; by default `train`.
        format: how `output` is written: `directory`, or the name of a registered `Writer`.
        seed: of everything drawn.
        force: replace a pruned model at `output`.
        on_progress: called with (work done, all work, what is being done).

    Returns:
        The pruned model, open: `module` to run, `report` (how near it is to the masked model, and what the refit
        gained at each site), `record` (what `optin.json` holds). With an `output` it is what was loaded back.

    Raises:
        ArtefactError: where mask and model don't belong together.
        InputError: for data that can't be read, or that gives values that are not finite.
        UsageError: for something else at `output`.

    Example:
        >>> small = optin.apply(model, mask, batches)
        >>> small.report.params < small.report.dense_params
        True
        >>> small.report.deviation < 1e-4
        True
    """
    dense = open_model(model)
    chosen = mask if isinstance(mask, Mask) else read_mask(Path(mask))
    writer = writer_of(format)
    settings = make_settings(
        compensate,
        producers,
        readout,
        bn,
        samples,
        batch_size,
        max_length,
        byte_count(memory, "memory"),
        seed,
    )
    path = as_path(output)
    pruning.check_fit(dense, chosen)
    if path is not None:
        pruning.check_output(path, dense)
    rows = None if data is None else as_data(data, split)
    plan = make_plan(dense, chosen, settings, rows, at_most=samples is None)
    if path is not None and not force and not inplace:
        reused = pruning.existing(path, dense, chosen, plan)
        if reused is not None:
            return pruning.reopened(reused, dense, chosen)
    batches = open_check(dense, rows) if rows is not None and plan is None else None
    own = inplace and dense.original is None
    small = pruning.prune_model(
        dense if own else copy_of(dense), chosen, path, batches, plan, on_progress, writer=writer
    )
    if inplace and not own:
        into_original(small, small.mask.keep, small.mask.ranks, dense)
    return small


def save(
    model: PrunedModel, output: str | Path, *, format: str = DIRECTORY, force: bool = False
) -> PrunedModel:
    """Write a pruned model, load it back and compare it with the masked one, as `apply(..., output=...)` does.

    Args:
        model: of `apply` or `prune`.
        output: a directory to write.
        format: `directory`, or the name of a registered `Writer`.
        force: replace a pruned model that is there.

    Returns:
        What was loaded back.

    Raises:
        UsageError: for something else at `output`, and a model that was read from a directory.

    Example:
        >>> saved = optin.save(small, folder / "small")
        >>> optin.load(folder / "small").config.num_labels
        2
    """
    path = Path(output)
    if model.check is None:
        raise UsageError(f"{model.spec} is on disk already", "copy its directory")
    pruning.check_output(path, model)
    if not force:
        pruning.check_unmade(path)
    return pruning.write_verified(model, path, writer_of(format))


def make_settings(
    method: str,
    producers: bool,
    readout: bool,
    bn: bool,
    samples: int | None,
    batch_size: int,
    max_length: int | None,
    memory: int,
    seed: int,
) -> Compensation:
    """The options of compensation as one value."""
    chosen = Compensation(
        method=method,
        producers=producers,
        readout=readout,
        batch_size=batch_size,
        max_length=max_length,
        bn=bn,
        seed=seed,
        memory=memory,
    )
    return chosen if samples is None else replace(chosen, samples=samples)
