"""What people see: errors without tracebacks, warnings, interruptions."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer

from deltune.errors import DeltuneError

__all__ = [
    "check_picture",
    "drawing",
    "guarded",
    "paragraphs",
    "plain_number",
    "print_json",
    "quiet_libraries",
    "show_tracebacks",
]

_tracebacks: ContextVar[bool] = ContextVar("tracebacks", default=False)

_INTERRUPTED = 130
_WRONG_INPUT = 2
_PICTURES = (".svg", ".png", ".pdf")


def show_tracebacks(wanted: bool) -> None:
    """Whether errors show where they come from."""
    _tracebacks.set(wanted)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which then ends with a message and an exit status instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        show_warnings()
        try:
            return command(*args, **options)
        except KeyboardInterrupt as error:
            if _tracebacks.get():
                raise
            typer.echo(
                "\nStopped. Run the same command again: what was finished is kept, and training goes on from its last "
                "checkpoint.",
                err=True,
            )
            raise typer.Exit(_INTERRUPTED) from error
        except DeltuneError as error:
            if _tracebacks.get():
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(_WRONG_INPUT) from error

    return run


class _WarningHandler(logging.Handler):
    """Writes to the standard error stream as it is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.capitalize()}: {record.getMessage()}", err=True)


def show_warnings() -> None:
    """Show deltune's own warnings, once."""
    logger = logging.getLogger("deltune")
    if not any(isinstance(handler, _WarningHandler) for handler in logger.handlers):
        logger.addHandler(_WarningHandler(logging.WARNING))
        logger.propagate = False


def quiet_libraries() -> None:
    """Leave out progress bars and notes of other libraries, such as that a new head is new.

    Python warnings are shown; `TRANSFORMERS_VERBOSITY` brings the notes back.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ and not _tracebacks.get():
        transformers.utils.logging.set_verbosity_error()


def paragraphs(docstring: str | None) -> str:
    """A docstring with each paragraph on one line, for the terminal to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(docstring or "").split("\n\n"))


def print_json(content: Any) -> None:
    """One line of JSON on the standard output."""
    import json

    typer.echo(json.dumps(content, ensure_ascii=False, sort_keys=True))


def plain_number(value: Any) -> str:
    """A number with as many digits as are worth reading."""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def check_picture(picture: Path | None) -> None:
    """Refuse a picture in a format that cannot be drawn.

    Raises:
        DeltuneError: naming those that can.
    """
    if picture is not None and picture.suffix.lower() not in _PICTURES:
        raise DeltuneError(
            f"--picture {picture}: its ending says the format; it must be one of {', '.join(_PICTURES)}."
        )


@contextmanager
def drawing(picture: Path) -> Iterator[None]:
    """Inside the block a picture is drawn into the file ``picture``.

    Raises:
        DeltuneError: if matplotlib is not installed, or the file cannot be written.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise DeltuneError("Pictures need matplotlib: pip install 'deltune[report]'.") from error
    except OSError as error:
        raise DeltuneError(f"{picture} cannot be written: {error.strerror}. Choose another place.") from error
