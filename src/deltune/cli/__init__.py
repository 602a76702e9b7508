"""The command line: each command is a small file that parses, calls and prints.

Importing this package is quick; a command loads torch and transformers when it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deltune import __version__
from deltune.cli.reporting import guarded, paragraphs, show_tracebacks

__all__ = ["build", "main"]

#: Each command, the module below this package, and the function in it; one whose module is not installed is left out.
_COMMANDS = {
    "tune": ("tune", "tune"),
    "compare": ("compare", "compare"),
    "eval": ("evaluate", "evaluate"),
    "predict": ("predict", "predict"),
    "merge": ("merge", "merge"),
    "export": ("export", "export"),
    "ranks": ("ranks", "ranks"),
    "changes": ("changes", "changes"),
    "gates": ("gates", "gates"),
    "methods": ("methods", "methods"),
    "sites": ("sites", "sites"),
}

#: Commands that take options which depend on other options, such as those of a method.
_OPEN = frozenset({"tune"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the exit status is 2 for wrong input and 130 when interrupted.

    Args:
        arguments: by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_tracebacks("--debug" in given)
    build()([item for item in given if item != "--debug"], prog_name="deltune")


def build() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="deltune",
        help="Fine-tune pretrained models in every parameter-efficient way, and compare the ways.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, (module, function) in _COMMANDS.items():
        if importlib.util.find_spec(f"{__name__}.{module}") is None:
            continue
        command = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        settings = {"allow_extra_args": True, "ignore_unknown_options": True} if name in _OPEN else {}
        app.command(name, help=paragraphs(command.__doc__), context_settings=settings)(guarded(command))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from; works anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Options of every command."""
