"""The `optin` command: the commands, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import inspect as signatures
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import optin_cli
from optin_cli import console, log_file
from optin_cli.commands import defaults
from optin_cli.commands.apply import apply
from optin_cli.commands.bench import bench
from optin_cli.commands.config import config
from optin_cli.commands.evaluate import evaluate
from optin_cli.commands.export import export
from optin_cli.commands.families import families
from optin_cli.commands.groups import as_command, flag_of, option, spelling_of
from optin_cli.commands.inspect import inspect
from optin_cli.commands.pick import pick
from optin_cli.commands.prune import prune
from optin_cli.commands.push import push
from optin_cli.commands.rankings import rankings
from optin_cli.commands.report import report
from optin_cli.commands.score import score
from optin_cli.commands.select import select
from optin_cli.commands.sweep import sweep
from optin_cli.commands.vocab import vocab
from optin_cli.errors import OptinError, PeerFailure
from optin_cli.interrupts import INTERRUPTED, TERMINATED, Terminated, exit_code, silence


class _InPanels:
    """Help in panels. Errors of usage stay the plain lines that `rich_markup_mode=None` makes them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        rich_utils.rich_format_help(obj=self, ctx=ctx, markup_mode="rich")  # type: ignore[arg-type]


class PanelCommand(_InPanels, TyperCommand):
    """A command whose errors say where a value came from that nobody typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if where := defaults.came_from(ctx, error.param):
                error.message = f"{error.message.rstrip('.')}. It comes from {where}."
            raise

    def invoke(self, ctx: Any) -> Any:
        with defaults.known(ctx):
            return super().invoke(ctx)


class PanelGroup(_InPanels, TyperGroup):
    pass


_LOG = option(
    "log_file",
    Path | None,
    typer.Option(
        "--log-file",
        metavar="FILE",
        rich_help_panel="Output",
        help="Append notes, progress and errors to a file, with times.",
    ),
    None,
)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every error a command raises into one message and its exit code, and log the run where that is asked for."""

    @functools.wraps(command)
    def run(log_file: Path | None = None, **given: Any) -> None:
        console.configure(quiet=bool(given.get("quiet")), explain=bool(given.get("explain")))
        try:
            with logged(log_file):
                _run(command, given)
        except OptinError as error:  # the log itself
            console.error(error, spelling_of(command, COMMANDS.values()))
            raise typer.Exit(error.exit_code) from None

    parameters = [*signatures.signature(command).parameters.values(), _LOG]
    vars(run)["__signature__"] = signatures.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def logged(path: Path | None) -> AbstractContextManager[None]:
    """The log of this run."""
    return log_file.opened(path, ["optin", *sys.argv[1:]])


def _run(command: Callable[..., None], given: dict[str, Any]) -> None:
    try:
        command(**given)
    except PeerFailure as error:
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise _ended(INTERRUPTED) from None
    except Terminated:
        raise _ended(TERMINATED) from None
    except BrokenPipeError:  # the reader of our stdout went away
        silence(sys.stdout.fileno())
        raise typer.Exit(0) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if (
            code := exit_code()
        ) is not None:  # a library has made something else of the signal, and we perhaps of that
            raise _ended(code) from None
        if isinstance(error, OptinError):
            spelling = spelling_of(command, COMMANDS.values())
            console.error(error, spelling, defaults.remarks(error.params, spelling))
            raise typer.Exit(error.exit_code) from None
        console.unexpected(error)
        raise typer.Exit(1) from None


def _ended(code: int) -> typer.Exit:
    """The end that a signal has asked for."""
    word = "interrupted" if code == INTERRUPTED else "ended by SIGTERM"
    console.note(f"{word}; run the same command again to go on", always=True)
    return typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        console.data(f"optin {optin_cli.__version__}")
        raise typer.Exit


def optin(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE.yaml",
            envvar=defaults.FILE_VARIABLE,
            show_envvar=False,
            help="Defaults of options (default: [tool.optin] in the nearest pyproject.toml).",
        ),
    ] = None,
) -> None:
    """Make a pretrained transformer or CNN smaller and faster without retraining it.

    model + data --score--> ranking.h5 --select--> mask.json --apply--> smaller model --bench, eval--> numbers
    """
    commands = context.command.commands  # type: ignore[attr-defined]
    console.configure(quiet=False)
    try:
        found = defaults.read_defaults(file, commands)
    except OptinError as error:
        console.error(error, flag_of)
        raise typer.Exit(error.exit_code) from None
    defaults.use(found)
    context.default_map = found.values()
    for message in defaults.unknown_variables(commands):
        logging.getLogger("optin").warning("%s", message)


def _help(command: Callable[..., None]) -> str:
    """A docstring with each paragraph on one line: the terminal wraps it."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


def _first_sentence(command: Callable[..., None]) -> str:
    """The first sentence of a command's help, whole: typer cuts it after 45 characters."""
    return _help(command).split("\n\n")[0].split(". ")[0].rstrip(".") + "."


COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune,
    "score": score,
    "select": select,
    "apply": apply,
    "bench": bench,
    "eval": evaluate,
    "export": export,
    "vocab": vocab,
    "sweep": sweep,
    "pick": pick,
    "report": report,
    "push": push,
    "inspect": inspect,
    "rankings": rankings,
    "families": families,
    "config": config,
}


def with_variables(command: Callable[..., None], name: str) -> Callable[..., None]:
    """A command whose options also take values from the environment."""
    parameters = defaults.with_variables(list(signatures.signature(command).parameters.values()), name)
    vars(command)["__signature__"] = signatures.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def make_app() -> typer.Typer:
    """The app, with an option for every kind of budget that is registered by now."""
    made = typer.Typer(
        name="optin",
        cls=PanelGroup,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(optin)
    for name, command in COMMANDS.items():
        register = made.command(
            name, cls=PanelCommand, help=_help(command), short_help=_first_sentence(command)
        )
        register(with_variables(guarded(as_command(command)), name))
    return made


app = make_app()


def main() -> None:
    """Entry point of the `optin` script."""
    app()
