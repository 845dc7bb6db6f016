"""Upload a pruned directory to the hub."""

from __future__ import annotations

from pathlib import Path

from optin_cli.pruning.push import Pushed, Upload
from optin_cli.pruning.push import push as upload_model


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> Pushed:
    """Upload a pruned directory to the hub, as one commit.

    Args:
        folder: of `apply`, `prune` or `save`, or of a sweep.
        repo: `org/name`; made if it is not there.
        private: of a new repository.
        revision: a branch, made if it is not there; by default `main`.
        message: of the commit.
        dry_run: say what would be uploaded alone.
        force: add to a repository that holds something else.

    Returns:
        The name of the repository, the address of the commit and the files with their sizes.

    Raises:
        ArtefactError: for a directory that is not a finished pruned model.
        UsageError: for a name that can't be, and a repository that holds something else.
        InputError: where there is no token, and where the hub can't be reached or refuses.

    Example:
        >>> pushed = optin.push(folder / "small", "org/small", dry_run=True)
        >>> {"README.md", "config.json", "model.safetensors"} <= set(pushed.files)
        True
    """
    return upload_model(Path(folder), repo, Upload(private, revision, message, dry_run), force=force)
