"""The only place that writes to stdout and stderr. Data on stdout; tables, notes and progress on stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from optin_cli import log_file
from optin_cli.errors import InputError, OptinError, Spelling, first_line, in_python, spelled
from optin_cli.interrupts import silence

JSON_SCHEMA_VERSION = 1
_PLAIN_INTERVAL = 5.0  # seconds between progress lines without a terminal
_LOG_INTERVAL = 30.0  # and in a log


_muted = _quiet = False


class ProgressCallback(Protocol):
    def __call__(self, done: float, total: float, what: str, /) -> None: ...


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """A text whose control characters are written out: names in a file could clear the reader's screen, or more."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _say(text: str) -> None:
    """Write to stderr, and to the log. Work that is done is not undone because nobody can hear of it."""
    log_file.write(Text.from_markup(text).plain)
    _show(text)


def _show(text: str) -> None:
    try:
        _stderr().print(text)
    except OSError:
        silence(sys.stderr.fileno())


def mute() -> None:
    """From now on write errors alone: for a process among several, of which one speaks."""
    global _muted
    _muted = True


def configure(*, quiet: bool, explain: bool = False) -> None:
    """Send the package's notes and warnings to stderr; the hub's retries end in one error of ours.

    `quiet` leaves warnings and errors alone there: what else would be said is in the log. `explain` adds why outputs
    are made or kept.
    """
    global _quiet
    _quiet = quiet
    logging.getLogger("optin.explain").setLevel(logging.INFO if explain else logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logger = logging.getLogger("optin")
    logger.handlers = [_NoteHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _NoteHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _muted:
            return
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        _say(f"[yellow]{kind}[/]{escape(shown(record.getMessage()))}")


def data(text: str) -> None:
    """Write data to stdout, as it is. Raises `InputError` where stdout takes none, other than a reader that left."""
    if _muted:
        return
    with _writing():
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout.fileno())
        raise InputError(f"can't write to standard output: {error.strerror}") from error


def emit_json(content: dict[str, Any]) -> None:
    """Write one JSON object to stdout."""
    data(json.dumps({"schema_version": JSON_SCHEMA_VERSION, **content}, indent=2, default=float))


def note(text: str, *, always: bool = False) -> None:
    """One line for the reader, on stderr; for those who want none, in the log alone, unless it is `always` said."""
    if _muted:
        return
    log_file.write(text)
    if always or not _quiet:
        _show(escape(shown(text)))


def error(problem: OptinError, spelling: Spelling = in_python, remarks: Sequence[str] = ()) -> None:
    """One message: what, and what to do next, with parameters written in the `spelling` of whoever reads it.

    `remarks` are further lines.
    """
    what, hint = problem.template
    text = f"[bold red]error:[/] {escape(shown(spelled(what, spelling)))}"
    for line in (*([spelled(hint, spelling)] if hint else []), *remarks):
        text += f"\n  {escape(shown(line))}"
    _say(text)


def unexpected(problem: BaseException) -> None:
    """A failure nobody planned for: one line, the traceback only when asked."""
    if os.environ.get("OPTIN_DEBUG"):
        _stderr().print_exception()
        return
    name, message = type(problem).__name__, first_line(problem)
    what = name if message == name else f"{name}: {message}"
    _say(f"[bold red]error:[/] unexpected {escape(shown(what))}\n  set OPTIN_DEBUG=1 to see the traceback")


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: bool = True,
    keys: int = 1,
    stdout: bool = False,
) -> None:
    """A table: the first column to the left, the others to the right unless they hold words (`numbers` False).

    On stderr, unless it is the data itself. A table of numbers that is wider than the terminal becomes several, each
    with the first `keys` columns, for no number may be cut off.
    """
    console = Console(highlight=False) if stdout else _stderr()
    if not console.is_terminal:
        console = Console(stderr=not stdout, highlight=False, width=200)
    columns, rows = [shown(name) for name in columns], [[shown(cell) for cell in row] for row in rows]
    if not stdout and log_file.is_open():
        text = io.StringIO()
        _print_table(
            Console(file=text, highlight=False, width=200), shown(title), columns, rows, numbers, keys
        )
        log_file.write(text.getvalue())
    with _writing() if stdout else suppress(OSError):
        _print_table(console, shown(title), columns, rows, numbers, keys)


def _print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: bool,
    keys: int,
) -> None:
    if title:
        console.print(f"[bold]{escape(title)}[/]")
    widths = [max(len(cells[i]) for cells in (columns, *rows)) + 2 for i in range(len(columns))]
    for part in _parts(widths, keys, console.width) if numbers else [list(range(len(columns)))]:
        grid = Table(box=None, pad_edge=False)
        for index in part:
            right = numbers and index > 0
            whole = right or (index == 0 and not numbers)
            side: Literal["left", "right"] = "right" if right else "left"
            grid.add_column(columns[index], justify=side, no_wrap=whole, overflow="fold")
        for row in rows:
            grid.add_row(*(escape(row[index]) for index in part))
        console.print(grid)


def _parts(widths: Sequence[int], keys: int, room: int) -> list[list[int]]:
    """Columns in groups that fit into `room`, each behind the first `keys` columns."""
    first = list(range(keys))
    parts = [first.copy()]
    for index in range(keys, len(widths)):
        # the last column needs no gap behind it
        full = sum(widths[i] for i in (*parts[-1], index)) - 2 > room
        if full and len(parts[-1]) > keys:
            parts.append(first.copy())
        parts[-1].append(index)
    return parts


def facts(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Names and values, one a line, on stdout."""
    width = max(len(row[0]) for row in rows)
    data(shown("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""])))


def drawing(title: str, lines: Sequence[str]) -> None:
    """A chart of characters on stdout, in colour on a terminal; nothing where there is no line."""
    if not lines or _muted:
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(title)}[/]")
    for line in lines:
        console.print(Text(line, style="blue" if console.is_terminal else ""))
    console.print()


def plain_characters() -> bool:
    """Whether stdout can write no block characters."""
    try:
        "█░·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return True
    return False


@contextmanager
def progress(enabled: bool = True) -> Iterator[ProgressCallback]:
    """A callback (done, total, what): a bar with a time estimate on a terminal, a line now and then otherwise."""
    log = _lines(log_file.write, _LOG_INTERVAL) if log_file.is_open() and not _muted else _nothing
    if _muted or _quiet or not enabled:
        yield log
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield _both(callback, log)
    else:
        yield _both(_lines(lambda text: _show(escape(shown(text))), _PLAIN_INTERVAL), log)


def _nothing(done: float, total: float, what: str, /) -> None:
    pass


def _both(one: ProgressCallback, other: ProgressCallback) -> ProgressCallback:
    def update(done: float, total: float, what: str, /) -> None:
        one(done, total, what)
        other(done, total, what)

    return one if other is _nothing else update


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr(), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(done: float, total: float, what: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(shown(what)))

        yield update


def _lines(write: Callable[[str], None], interval: float) -> ProgressCallback:
    """A line every `interval` seconds."""
    started = last = time.monotonic()
    before = 0.0

    def update(done: float, total: float, what: str) -> None:
        nonlocal started, last, before
        now = time.monotonic()
        if done < before:  # another stage begins, with a new clock
            started = now
        before = done
        if now - last < interval:
            return
        last = now
        share = done / total if total else 1.0
        # the first pieces of work also pay for warming up: no estimate from them
        rest = (now - started) * (1 - share) / share if share > 0.02 else 0.0
        left = f", about {duration(rest)} left" if rest >= 1 else ""
        write(f"{100 * share:3.0f} %  {what}{left}")

    return update


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 1:
        return "under a second"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def count(value: float) -> str:
    """`1.23 G`, `45.6 M`, `789`: MACs and parameters."""
    for limit, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"


def plural(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def size(value: float) -> str:
    """`43.3 MiB`."""
    for limit, suffix in ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f} B"
