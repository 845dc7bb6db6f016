"""`optin push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.commands import options
from optin_cli.commands.groups import Group, everyday
from optin_cli.pruning.push import Upload
from optin_cli.pruning.push import push as upload_model


@everyday("private", "revision", "message", "dry_run")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Written by `optin apply` or `optin prune`.")],
    repo: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub; made if it is not there.")
    ],
    upload: Annotated[Upload, Group(Upload)],
    writing: options.Output,
) -> None:
    """Upload a pruned directory to the Hugging Face hub, with its model card, as one commit.

    The directory is checked first: its record, its weights and its config.

    Examples:

      optin push m-60/ me/minilm-60 --private

      optin push m-60/ me/minilm-60 --dry-run
    """

    def show(files: dict[str, int]) -> None:
        if not writing.quiet:
            for name, size in files.items():
                console.note(f"{name}  {console.size(size)}")

    done = upload_model(folder, repo, upload, force=writing.force, on_files=show)
    if not writing.quiet:
        what = "would upload" if upload.dry_run else "uploaded"
        console.note(
            f"{what} {console.plural(len(done.files), 'file')}, {console.size(done.nbytes)}, to {done.repo}"
        )
    if writing.json:
        console.emit_json({**asdict(done), "bytes": done.nbytes, "dry_run": upload.dry_run})
    else:
        console.data(done.url or done.repo)
