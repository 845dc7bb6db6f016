"""`optin vocab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_writable
from optin_cli.commands import options
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.present import show_reading
from optin_cli.vocabulary.settings import VocabularySettings

if TYPE_CHECKING:
    from optin_cli.vocabulary.reduce import Reduced


@everyday("data", "output", "keep", "coverage")
def vocab(
    model: options.Model,
    data: options.TextData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Model directory to write.")],
    settings: Annotated[VocabularySettings, Group(VocabularySettings)],
    opening: options.PlainOpening,
    writing: options.Updated,
) -> None:
    """Keep the tokens that data needs, and drop the rows of all others from the embeddings.

    Special tokens, bytes and single characters always stay, so that any text can still be read: a word whose token is
    gone is split into smaller pieces. Text whose tokens are all kept gives the same outputs as before. Do this before
    pruning: budgets then count the smaller embeddings.

    Examples:

      optin vocab demo:minilm --data builtin:prose -o minilm-small/

      optin vocab ./my-bert --data glue/sst2 --coverage 0.9999 -o my-bert-small/

      optin prune my-bert-small/ --data glue/sst2 --params 0.7 -o my-bert-70/
    """
    from optin_cli.vocabulary import reduce as stage

    check_writable(output, "folder")
    opened = opening.open(model, "float32")
    stage.check_output(output, opened)
    batches = stage.open_counted(opened, data, settings)
    if not writing.quiet:
        show_reading(batches.examples)
    found = options.existing(writing, output, lambda: stage.existing(output, opened, batches, settings))
    if found is None:
        with console.progress(not writing.quiet) as on_progress:
            found = stage.reduce_vocabulary(opened, batches, settings, output, on_progress).report
    if not writing.quiet:
        _show(found)
    if writing.json:
        console.emit_json(_facts(found))
    else:
        console.data(str(output))


def _show(found: Reduced) -> None:
    """What is left, on stderr."""
    if found.reused:
        console.note(f"{found.path} is already the model of these inputs")
    record, before = found.record, found.record.model
    sizes = [(before["tokens"], record.tokens), *[(before["params"], record.params)] * 2]
    shown = ["{:,}".format, console.count, lambda count: console.size(count * found.itemsize)]
    rows = [
        [name, show(old), show(new), f"{100 * new / old:.1f} %"]
        for name, show, (old, new) in zip(("tokens", "parameters", "weights"), shown, sizes, strict=True)
    ]
    console.table("", ["", "before", "after", "left"], rows)
    console.note(
        f"{100 * record.covered:.3f} % of the {record.counted:,} tokens in {record.checked_on} are kept; "
        f"{record.always:,} tokens would be for any data"
    )
    console.note(
        f"of more text of its kind, about {100 * record.unseen:.2f} % or more would be tokens that it has not"
    )
    console.note(f"largest deviation from the outputs before, on kept tokens: {record.deviation:.1e}")


def _facts(found: Reduced) -> dict[str, Any]:
    return {
        "model": str(found.path),
        "reused": found.reused,
        **found.record.facts(),
        "bytes": found.params * found.itemsize,
        "dense_bytes": found.dense_params * found.itemsize,
    }
