"""Where `mpt` starts, and the only place a user error is caught."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mpt import __version__
from mpt.errors import EXIT_INTERRUPTED, EXIT_USAGE, MptError, RecipeError

from . import bench, chaos, data, generate, model, run, submit

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a YAML recipe and your own text into your own MPT language model.",
    epilog="Begin with: mpt init tiny, then mpt train tiny.yaml",
)
for command in (run.train, run.resume, run.status, run.verify, run.init):
    app.command()(command)
app.command()(submit.submit)
app.command()(chaos.chaos)
app.command()(model.export)
app.command("import")(model.import_)
app.command()(generate.generate)
app.command()(bench.bench)
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
    _open_missing_streams()
    try:
        app()
    except RecipeError as error:
        print(error, file=sys.stderr)  # each line has its own place in front
        sys.exit(error.exit_code)
    except MptError as error:
        print(f"mpt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("mpt: interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"mpt: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _open_missing_streams() -> None:
    """Where the caller has closed stdin, stdout or stderr, no file of ours must get its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            free = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(free, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


if __name__ == "__main__":
    main()
