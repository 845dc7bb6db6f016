"""The `optin` script: signals and streams are in order before anything slow is imported."""

from __future__ import annotations

import sys

from optin_cli import interrupts


def main() -> None:
    """Run the command line; ends the process."""
    interrupts.open_streams()
    interrupts.install()
    try:
        from optin_cli.main import main as run

        run()
    except (KeyboardInterrupt, interrupts.Terminated):
        sys.exit(interrupts.exit_code())
    except SystemExit as end:
        if end.code == 1 and interrupts.exit_code() is not None:  # typer calls an interrupt a failure
            sys.exit(interrupts.exit_code())
        raise
    finally:
        interrupts.uninstall()


if __name__ == "__main__":
    main()
