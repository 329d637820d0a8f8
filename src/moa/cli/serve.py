"""``moa serve``: an OpenAI-compatible server for a trained adapter, by vLLM."""

from __future__ import annotations

from typing import Annotated

import typer

from moa.cli.options import BaseOption


def serve(
    context: typer.Context,
    adapters: Annotated[
        list[str], typer.Argument(help="Folder of an adapter, or NAME=FOLDER; several of one base.", metavar="ADAPTER")
    ],
    base: BaseOption = None,
) -> None:
    """Serve adapters on their base model through vLLM, with the OpenAI API. Needs `pip install 'moa-lm[serve]'`.

    Options go to vLLM as they are. Chats are written in the form that the adapter was trained with. Clients ask for the
    model by the adapter's name, which is its folder's unless you say another; of several adapters every request
    chooses one, or the base model by its own name. With `--max-loras N` there are N slots, and others of the same
    experts, router and gating come and go while it runs, by vLLM's API; `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` allows it.

    Examples:
        `moa serve runs/my-adapter`

        `moa serve bookings=runs/my-adapter sums=runs/other --port 8001`

        `moa serve policy=runs/my-adapter --max-loras 1`

        `moa serve bookings=runs/my-adapter --port 8001 --dtype bfloat16 --max-model-len 2048`
    """
    import os
    import sys

    from moa.serving.command import plan

    given = [*adapters, *context.args]
    options = next((place for place, word in enumerate(given) if word.startswith("-")), len(given))
    server = plan(given[:options], given[options:], base=base)
    _check_engine()
    for name, folder in server.adapters.items():
        typer.echo(f"serving {name} ({folder}) on {server.base}, prompts by the template {server.template}")
    typer.echo(f"starting {' '.join(server.command[1:3])}; clients ask for a model by these names")
    sys.stdout.flush()
    os.execv(server.command[0], server.command)


def _check_engine() -> None:
    """Say what is missing before anything is started."""
    from moa.extras import extra
    from moa.serving.releases import check_release

    with extra("serve"):
        import vllm
    check_release(vllm.__version__)
