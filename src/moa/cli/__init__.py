"""The command ``moa``: one file or folder per verb, imported when it is asked for.

Heavy libraries are imported inside the verbs.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from moa.cli.errors import INTERRUPTED, UsageError, report, say
from moa.cli.keys import ANY_FLAG, KeysCommand, StudyKeysCommand

VERBS = (
    *("demo", "train", "bench", "watch", "eval", "generate", "inspect", "export", "serve", "import-reference"),
    *("schema", "env", "recipes", "spans"),
)
"""In the order of the help page. A verb's file and the function (or group of verbs) in it have its name."""

OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"cls": KeysCommand, "context_settings": ANY_FLAG},
    "bench": {"cls": StudyKeysCommand, "context_settings": ANY_FLAG},
    "serve": {"context_settings": ANY_FLAG},
}
"""Of typer, for verbs that take flags which no signature names."""


def new_group(**options: Any) -> typer.Typer:
    """An empty group of verbs."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown", **options)


class Verbs(TyperGroup):
    """The group of all verbs: imports them, and turns exceptions into messages and exit codes."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in VERBS and self.commands[cmd_name] is None:
            name, one = cmd_name.replace("-", "_"), new_group()
            found = getattr(import_module(f"{__name__}.{name}"), name)
            if isinstance(found, typer.Typer):
                one.add_typer(found, name=cmd_name)
            else:
                one.command(cmd_name, **OPTIONS.get(cmd_name, {}))(found)
            self.commands.update(get_group(one).commands)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UsageError, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("stopped", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            raise typer.Exit(report(error, trace=ctx.params["debug"])) from None


app = new_group(cls=Verbs, no_args_is_help=True)


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MOA_DEBUG", help="Show a stack trace with every error.")
    ] = False,
) -> None:
    """Fine-tune Hugging Face language models with heterogeneous mixtures of adapters."""
    # PEFT and TRL still ask transformers by the old name; the user can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
