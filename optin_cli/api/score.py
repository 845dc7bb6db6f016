"""Score a model's units."""

from __future__ import annotations

from pathlib import Path

from optin_cli import pipeline
from optin_cli.api.models import Data, Model, Progress, as_path, open_model, silent
from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.opening import as_data
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings
from optin_cli.sizes import byte_count


def score(
    model: Model,
    data: Data,
    *,
    output: str | Path | None = None,
    samples: int = 512,
    method: str = DEFAULT_METHOD,
    probes: int = 2,
    rel_error: float | None = None,
    strata: int | None = None,
    exact_band: float | None = None,
    band_flops: float | None = None,
    precision: str = "full",
    sketch_rows: int = 512,
    rows: int = 768,
    per_batch: bool = False,
    tokens: bool = False,
    ranks: bool | None = None,
    temperature: float | None = None,
    output_weight: float | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    memory: int | str | None = None,
    split: str | None = None,
    seed: int = 0,
    force: bool = False,
    on_progress: Progress = silent,
) -> Ranking:
    """Score every head, neuron and channel by how much the model's trajectory changes without it.

    The score of a unit is OPTIN's equation 1 (Khaki & Plataniotis, ICLR 2024): the change of the relations between
    tokens in all deeper blocks, and of the output. No labels and no training.

    Args:
        model: see `open_model`.
        data: a data set's name or path, a `DataSpec`, a `datasets.Dataset`, a list of texts, a DataLoader, or any
            iterable of batches: tensors, dicts of tensors, or (inputs, labels). Batches are read as far as `samples`
            and kept in memory.
        output: where the ranking is written (HDF5). A run that is cut short then resumes, and a ranking of the same
            inputs is reused. Without it nothing is left on disk.
        samples: calibration examples.
        method: `curvature`, `ablation`, `mixed`, `fisher` (needs labels), `knowledge`, `reference`, `flap`, `wanda-sp`,
            `depth` (whole blocks), `magnitude` or `random`.
        probes: curvature probes for each batch.
        rel_error: probe until the scores' relative error from probing is this, in (0, 1).
        strata: runs of blocks whose features share a backward pass; None for one of each block up to 10 blocks, 3 of
            deeper models.
        exact_band, band_flops: score the share `exact_band` of the units on either side of the cut at this budget
            again, by ablation.
        precision: `full`, or `reduced`: ablation multiplies changes in TF32 or bfloat16.
        sketch_rows: gradients kept for the interactions between units; 0 for none.
        rows: tokens of a batch that enter the relations.
        per_batch: `fisher` squares the mean gradient of a batch, as PTF's code does.
        tokens: measure what merging tokens costs, too (vision transformers).
        ranks: measure what lower ranks of heads cost, too: fewer dimensions in each head of a layer; None where there
            are heads of 16 dimensions or more that can be cut.
        temperature: of the output term; None for the method's own.
        output_weight: lambda, the weight of the output term; None for the budget to decide.
        batch_size, max_length: examples in a batch, and tokens of a text at most. Batches that you give stay theirs.
        memory: bytes that activations may take, or a size such as `4GiB`.
        split: of the data; by default `train`.
        seed: of everything drawn.
        force: score again where `output` is there.
        on_progress: called with (work done, all work, what is being done).

    Returns:
        The ranking: for each site `score` [units], higher for what matters more.

    Raises:
        UsageError: for options that can't be met, and for another file at `output`.
        InputError: for data that the model can't read.

    Example:
        >>> ranking = optin.score(model, batches, samples=16)
        >>> {site.name: site.score.shape for site in ranking.sites}["blocks.0.heads"]
        (4,)
    """
    settings = ScoreSettings(
        method=method,
        samples=samples,
        batch_size=batch_size,
        max_length=max_length,
        rows=rows,
        probes=probes,
        rel_error=rel_error,
        strata=strata,
        exact_band=exact_band,
        band_flops=band_flops,
        precision=precision,
        sketch_rows=sketch_rows,
        temperature=temperature,
        output_weight=output_weight,
        per_batch=per_batch,
        tokens=tokens,
        ranks=ranks,
        seed=seed,
    )
    settings = configured(settings)  # what it raises comes before the model is opened
    limit = None if memory is None else byte_count(memory, "memory")
    plan = make_plan(open_model(model), as_data(data, split), settings, limit)
    return pipeline.score(plan, as_path(output), on_progress, force=force)
