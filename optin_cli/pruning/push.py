"""`push`: upload a pruned directory to the hub, as one commit. What is not a finished pruned model is refused first."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from optin_cli.artefacts.pruned import FILE_NAME, check_weights, read_checked
from optin_cli.data import hub
from optin_cli.errors import ArtefactError, InputError, UsageError, first_line, param

log = logging.getLogger("optin")

_STALE = ("*.safetensors", "*.safetensors.index.json", "modeling_optin.py", "*.bin")
"""Files of the repository that go where the new model has none of that name: they belong to an earlier one."""
_BEGUN = {".gitattributes", "README.md", "LICENSE"}
"""Files that a repository may have before it has a model."""
T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """How a model is uploaded."""

    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(
        default=None,
        metadata={
            "metavar": "BRANCH",
            "help": "Branch to commit to; made if it is not there (default: main).",
        },
    )
    message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    dry_run: bool = field(default=False, metadata={"help": "Say what would be uploaded, and upload nothing."})


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    repo: str
    url: str
    """Of the commit; '' of a dry run."""
    files: dict[str, int]
    """Path in the repository -> bytes."""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def push(
    folder: Path,
    repo: str,
    upload: Upload = Upload(),
    *,
    force: bool = False,
    on_files: Callable[[dict[str, int]], None] = lambda files: None,
) -> Pushed:
    """Upload the pruned model in `folder` to the hub's `repo`, which is made if it is not there.

    `on_files` is called with what is going to be uploaded. Raises `UsageError` for names and options that can't be
    and a repository that holds something else, unless `force`; `ArtefactError` for a directory that is no finished
    pruned model; `InputError` where the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi, constants, get_token

    files = finished(folder)
    _check_name(repo)
    on_files(files)
    if upload.dry_run:
        return Pushed(repo, "", files)
    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set, so that nothing is uploaded", "unset it")
    if get_token() is None:
        raise InputError(
            "there is no token for the hub", "run `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api, branch = HfApi(library_name="optin"), upload.revision or "main"
    held = _held(api, repo, branch)
    if held is not None and not force and FILE_NAME not in held and set(held) - _BEGUN:
        raise UsageError(
            f"{repo} is there already, and holds something that optin did not make",
            f"choose another name, or {param('force', True)} to add to it",
        )
    if held is None:
        made = _hub(repo, lambda: api.create_repo(repo, private=upload.private or None, exist_ok=True))
        repo = made.repo_id
    if upload.revision:
        _hub(repo, lambda: api.create_branch(repo, branch=branch, exist_ok=True))
    done = _hub(
        repo,
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=branch,
            commit_message=upload.message or f"Pruned model {folder.resolve().name}",
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=list(_STALE),
        ),
    )
    return Pushed(repo, str(done.commit_url), files)


def finished(folder: Path) -> dict[str, int]:
    """The files of a finished pruned directory, with their sizes. Raises `ArtefactError` for anything else.

    Hidden files, and links that lead out of it, are not among them.
    """
    if not folder.is_dir():
        raise UsageError(f"no directory at {folder}")
    if not (folder / FILE_NAME).is_file():
        raise ArtefactError(
            f"{folder} has no {FILE_NAME}: it is not a pruned model", "write one with `optin apply`"
        )
    read_checked(folder)
    check_weights(folder)
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"{folder} has no config.json", "run `optin apply` again")
    home, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.resolve().is_relative_to(home):
            found[name.as_posix()] = path.stat().st_size
        else:
            log.warning("%s is a link out of the model's directory: it is not uploaded", path)
    return found


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is not a name on the hub: {first_line(error)}", "write org/name"
        ) from error


def _held(api: Any, repo: str, branch: str) -> list[str] | None:
    """Files of a repository's branch, none where that is still to be made; None where there is no repository."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def files() -> list[str] | None:
        try:
            info = api.repo_info(repo, revision=branch)
            return [sibling.rfilename for sibling in info.siblings or []]
        except RevisionNotFoundError:
            return []
        except RepositoryNotFoundError as error:
            if hub.status_of(error) == 401:  # the token is refused, whatever there is
                raise
            return None

    return _hub(repo, files)


def _hub(repo: str, call: Callable[[], T]) -> T:
    return hub.ask(call, lambda error: _refusal(repo, hub.status_of(error), error))


def _refusal(repo: str, status: int | None, error: Exception) -> InputError:
    owner = repo.partition("/")[0]
    if status == 401:
        return InputError("the hub does not accept the token", "run `hf auth login` with one that is valid")
    if status == 403:
        return InputError(
            f"the token may not write to {repo}",
            f"use a token with write access to {owner}, or another name",
        )
    if status == 404:
        return InputError(
            f"the hub has no {repo}, or nothing that the token may see", f"check the name of {owner}"
        )
    if status == 409:
        return InputError(
            f"{repo} was changed or taken at the same time", "run it again, or choose another name"
        )
    if hub.is_passing(error):
        return InputError(
            f"the hub could not be reached in {hub.TRIES} tries: {hub.brief(error)}",
            "check the network and run it again",
        )
    return InputError(f"the hub refuses {repo}: {first_line(error)}")
