"""The `optin` command: the commands, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import optin_cli
from optin_cli import console
from optin_cli.commands.apply import apply
from optin_cli.commands.bench import bench
from optin_cli.commands.evaluate import evaluate
from optin_cli.commands.families import families
from optin_cli.commands.groups import as_command, spelling_of
from optin_cli.commands.inspect import inspect
from optin_cli.commands.pick import pick
from optin_cli.commands.prune import prune
from optin_cli.commands.report import report
from optin_cli.commands.score import score
from optin_cli.commands.select import select
from optin_cli.commands.sweep import sweep
from optin_cli.errors import OptinError, PeerFailure
from optin_cli.interrupts import INTERRUPTED, TERMINATED, Terminated, exit_code, silence


class _InPanels:
    """Help in panels. Errors of usage stay the plain lines that `rich_markup_mode=None` makes them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        rich_utils.rich_format_help(obj=self, ctx=ctx, markup_mode="rich")  # type: ignore[arg-type]


class PanelCommand(_InPanels, TyperCommand):
    pass


class PanelGroup(_InPanels, TyperGroup):
    pass


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every error a command raises into one message and its exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        console.configure_logging()
        try:
            command(*args, **kwargs)
        except PeerFailure as error:
            raise typer.Exit(error.exit_code) from None
        except OptinError as error:
            console.error(error, spelling_of(command, COMMANDS.values()))
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
            if (code := exit_code()) is not None:  # a library has made something else of the signal
                raise _ended(code) from None
            console.unexpected(error)
            raise typer.Exit(1) from None

    return run


def _ended(code: int) -> typer.Exit:
    """The end that a signal has asked for."""
    word = "interrupted" if code == INTERRUPTED else "ended by SIGTERM"
    console.note(f"{word}; run the same command again to go on")
    return typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        console.data(f"optin {optin_cli.__version__}")
        raise typer.Exit


def optin(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a pretrained transformer or CNN smaller and faster without retraining it.

    model + data --score--> ranking.h5 --select--> mask.json --apply--> smaller model --bench, eval--> numbers
    """


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
    "sweep": sweep,
    "pick": pick,
    "report": report,
    "inspect": inspect,
    "families": families,
}


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
        register(guarded(as_command(command)))
    return made


app = make_app()


def main() -> None:
    """Entry point of the `optin` script."""
    app()
