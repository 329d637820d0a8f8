"""What the user sees when something fails.

A mistake of the user's (a ValueError that moa raises on purpose, or an OSError) is one red message and exit code 2; a
training that had to stop (`TrainingStopped`) likewise, with its own code. Anything else is taken for a bug and keeps
its trace, ValueErrors of libraries and of built-ins such as ``zip(strict=True)`` among them.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import typer
from rich.text import Text

from moa.cli.terminal import terminal

_PACKAGE = Path(__file__).parents[1]

LONGEST = 4000  # characters of a message
USER_MISTAKE = 2
BUG = 1
INTERRUPTED = 130

# What typer raises for wrong usage: click's class, or that of the click which newer releases carry inside.
UsageError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def code_of(error: Exception) -> int | None:
    """The exit code that ``error`` ends the command with; None for a bug."""
    from moa.extras import MissingExtra
    from moa.training.stops import TrainingStopped

    if isinstance(error, TrainingStopped):
        return error.exit_code
    if isinstance(error, OSError | MissingExtra) or (isinstance(error, ValueError) and _on_purpose(error)):
        return USER_MISTAKE
    return None


def report(error: Exception, *, trace: bool) -> int:
    """Print ``error`` for the user, with ``trace`` a mistake's stack trace, too; returns the exit code."""
    code = code_of(error)
    if code is None:
        terminal(stderr=True).print_exception()
        say("this looks like a bug in moa: please report it with the trace above and the output of `moa env`")
        return BUG
    if trace:
        terminal(stderr=True).print_exception()
    say(shortened(str(error)) or type(error).__name__)
    return code


def shortened(message: str) -> str:
    """A message may quote what it found, and that may be as long as a file."""
    return message if len(message) <= LONGEST else f"{message[:LONGEST]} ... ({len(message):,} characters)"


def _on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` in moa made the error: then its message was written for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(_PACKAGE):
        return False
    return (frames[-1].line or "").startswith("raise ")


def say(message: str, style: str = "red") -> None:
    """One message on standard error, as it is: no markup, no wrapping when it goes to a file."""
    console = terminal(stderr=True)
    console.print(Text(f"moa: {message}", style=style), soft_wrap=not sys.stderr.isatty())
