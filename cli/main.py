"""Where `mpt` starts, and the only place a user error is caught."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mpt import __version__
from mpt.errors import EXIT_INTERRUPTED, MptError

from . import data, model, run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a YAML recipe and your own text into your own MPT language model.",
    epilog="Begin with: mpt init tiny, then mpt train tiny.yaml",
)
for command in (run.train, run.resume, run.status, run.verify, run.init):
    app.command()(command)
app.command()(model.export)
app.command()(model.generate)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        typer.echo(f"mpt {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line; every exit code is one of mpt.errors."""
    try:
        app()
    except MptError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone, as in `mpt status | head -1`. Python would complain
        # once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str) -> None:
    """Print an error; the problems of a recipe have their places in front of each already."""
    print(
        "\n".join(
            f"mpt: {line}" if i == 0 else line for i, line in enumerate(message.splitlines())
        ),
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
