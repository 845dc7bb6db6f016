"""The hub: asked again after a pause where it is not reached, is busy or breaks off; then what it said is one error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from optin_cli.artefacts.files import disk_is_full
from optin_cli.errors import InputError, first_line

log = logging.getLogger("optin")

TRIES = 4
_REFUSED = (401, 403)
T = TypeVar("T")


def ask(call: Callable[[], T], in_words: Callable[[Exception], InputError]) -> T:
    """Call the hub, again after 2, 4 and 8 seconds for what may pass. Raises what `in_words` makes of its error."""
    from huggingface_hub.errors import HTTPError

    for tried in range(1, TRIES + 1):
        try:
            return call()
        except (HTTPError, OSError) as error:
            if not is_passing(error) or tried == TRIES:
                raise in_words(error) from error
            log.warning("the hub did not answer (%s): trying again in %d s", brief(error), 2**tried)
            time.sleep(2**tried)
    raise AssertionError("the last try returns or raises")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it comes from: the hub's client wraps what happened."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error comes from; None where there was no answer."""
    found = (getattr(getattr(one, "response", None), "status_code", None) for one in _chain(error))
    return next((status for status in found if status is not None), None)


def is_passing(error: BaseException) -> bool:
    """Return whether another try may succeed: no connection, one that breaks off, a hub that is busy or broken."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    chain = list(_chain(error))
    offline = constants.HF_HUB_OFFLINE or any(isinstance(one, OfflineModeIsEnabled) for one in chain)
    if offline or disk_is_full(error):
        return False
    status = status_of(error)
    if status is None:
        return any(isinstance(one, HTTPError | ConnectionError | TimeoutError) for one in chain)
    return status in (408, 429) or status >= 500


def brief(error: BaseException) -> str:
    """What happened, in a few words."""
    from huggingface_hub.errors import HTTPError

    if status := status_of(error):
        return f"status {status}"
    root = [one for one in _chain(error) if isinstance(one, HTTPError | ConnectionError | TimeoutError)]
    return f"{type(root[-1]).__name__}: {first_line(root[-1])}" if root else first_line(error)


def reason(error: BaseException) -> str:
    """Why something can't be fetched."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if is_passing(error):
        return f"it could not be reached in several tries ({brief(error)})"
    gated = any(isinstance(one, GatedRepoError) for one in _chain(error))
    if not gated and any(isinstance(one, RepositoryNotFoundError) for one in _chain(error)):
        return "it has none of that name, or a private one (then run `hf auth login`)"
    if gated or status_of(error) in _REFUSED:
        return "it wants a token that may read it (run `hf auth login`)"
    return first_line(error).partition(". ")[0]
