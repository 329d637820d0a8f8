"""What `moa serve` starts: the command line of vLLM's server for saved mixtures and the base they were trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from moa import models
from moa.data.templates import CHAT, TEMPLATES
from moa.data.tokens import end_of_turn, opening
from moa.serving.adapters import configuration
from moa.serving.releases import ARCHITECTURE, WORKER
from moa.training.base import adapter_base
from moa.training.beside import beside
from moa.training.recipe import FILE_NAME, Recipe

SERVER = "vllm.entrypoints.openai.api_server"
QUESTION = "{question}"


@dataclass(frozen=True)
class Server:
    """A server that is about to be started.

    Attributes:
        command: its command line.
        adapters: the name that clients ask for -> folder.
        base: the base model's name.
        template: the prompt template by which chats are rendered.
    """

    command: list[str]
    adapters: dict[str, str]
    base: str
    template: str


def plan(adapters: Sequence[str], rest: Sequence[str], *, base: str | None = None) -> Server:
    """The server for adapters, given as folders or ``name=folder``.

    Args:
        adapters: what to serve; by default an adapter has its folder's name.
        rest: arguments of vLLM's, passed on; what is set here can be overruled there, the model's class aside.
        base: as for `moa.models.find`; None: what the adapters were trained on.

    Raises:
        ValueError: an adapter cannot be served, two have one name, or they do not belong to one base.
        FileNotFoundError: no such folder.
    """
    _refuse_spans(rest)
    folders = _named(adapters)
    for folder in folders.values():
        configuration(folder)
    base = base or _common("base models", {name: adapter_base(folder) or "" for name, folder in folders.items()})
    template = _common("prompt templates", {name: _template(folder) for name, folder in folders.items()})
    source = models.find(base)
    if source.gguf:
        raise ValueError(f"the base {base!r} is a GGUF file, which is not served: convert it to a Hugging Face folder")
    tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options)
    slots = _slots(folders, rest)
    overrides = {"architectures": [ARCHITECTURE], "moa_adapters": folders}
    settings: dict[str, str] = {
        "--model": source.place,
        "--served-model-name": base if slots else next(iter(folders)),
        "--hf-overrides": json.dumps(overrides),
    }
    given = {argument.partition("=")[0].replace("_", "-") for argument in rest if argument.startswith("--")}
    if "--chat-template" not in given and (text := chat_template(template, tokenizer)) is not None:
        settings["--chat-template"] = text
    if (ends := _ends(source, tokenizer)) is not None:
        settings["--override-generation-config"] = json.dumps({"eos_token_id": ends})
    _refuse_taken(rest, bool(slots))
    ours = [part for option, value in settings.items() if option not in given for part in (option, value)]
    return Server([sys.executable, "-m", SERVER, *ours, *slots, *rest], folders, base, template)


def _named(adapters: Sequence[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for adapter in adapters:
        name, _, folder = adapter.rpartition("=")
        path = Path(models.existing(folder, "adapter")).resolve()
        name = name or path.name
        if name in folders:
            raise ValueError(f"two adapters are called {name!r}: give one of them another name, as in NAME={folder}")
        folders[name] = str(path)
    if not folders:
        raise ValueError("no adapter was given: name the folder of one, before any option")
    return folders


def _slots(folders: Mapping[str, str], rest: Sequence[str]) -> list[str]:
    """Options by which vLLM takes mixtures for LoRA adapters, chosen by the name of the model.

    None for one mixture that stays alone, which is served faster without.
    """
    given = any(argument.partition("=")[0].replace("_", "-") == "--max-loras" for argument in rest)
    if len(folders) == 1 and not given:
        return []
    number = [] if given else ["--max-loras", str(len(folders))]
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    return ["--enable-lora", *number, "--worker-cls", WORKER, "--lora-modules", *modules]


def _common(what: str, found: Mapping[str, str]) -> str:
    values = set(found.values())
    if len(values) > 1:
        raise ValueError(f"the adapters have different {what}: {dict(found)}. Serve them apart")
    value = values.pop()
    if not value:
        raise ValueError(f"the adapter {next(iter(found))} does not say its base model: name it with --base")
    return value


def _refuse_spans(rest: Sequence[str]) -> None:
    """Raise ValueError for a span plan, before anybody looks for an adapter."""
    if any(argument.partition("=")[0] == "--spans" for argument in rest):
        raise ValueError(
            "--spans: a plan keeps the first tokens of a text in sight and gives every head its own window, while vLLM "
            "has one window for all layers that slide, which forgets those tokens. Use `moa generate --spans`"
        )


def _refuse_taken(rest: Sequence[str], slots: bool) -> None:
    """Raise ValueError for arguments that would undo what makes it a server of mixtures."""
    taken = ["--model", "--hf-overrides", "--model-impl"]
    taken += ["--enable-lora", "--worker-cls", "--lora-modules"] if slots else []
    for argument in rest:
        option = argument.partition("=")[0].replace("_", "-")
        if option in taken:
            raise ValueError(f"{option} is set by moa serve: the base model is chosen with --base, nothing else there")


def _template(folder: str) -> str:
    """The prompt template that an adapter was trained with; the tokenizer's own if nothing says."""
    recipe = beside(folder, FILE_NAME)
    return Recipe.load(recipe).data.template if recipe else CHAT


def chat_template(name: str, tokenizer: Any) -> str | None:
    """A chat template that writes what the prompt template of that name does; None if it is the tokenizer's own.

    Args:
        name: one of `moa.data.TEMPLATE_NAMES`.
        tokenizer: of the base; what it puts before a text is written by the template, since servers add nothing to
            chats.

    Raises:
        ValueError: the template is the tokenizer's own, but it has none.
    """
    if name == CHAT:
        if not tokenizer.chat_template:
            raise ValueError(
                "nothing says how this adapter was prompted: there is no recipe.yaml beside it, and its base model has "
                "no chat template. Give one with vLLM's --chat-template FILE"
            )
        return None
    first = "".join(tokenizer.convert_ids_to_tokens(opening(tokenizer)))
    before, after = TEMPLATES[name].plain.format(instruction=QUESTION).split(QUESTION)
    return (
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
        "{{- raise_exception('this model was trained on single questions: send one message of the user') -}}"
        "{%- endif -%}"
        f"{{{{- {json.dumps(first + before)} + messages[0]['content'] + {json.dumps(after)} -}}}}"
    )


def _ends(source: models.Source, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer, if the base's own generation settings do not say all of them."""
    try:
        own = GenerationConfig.from_pretrained(source.place).eos_token_id
    except OSError:
        own = None
    said = set(own if isinstance(own, list) else [own]) - {None}
    ends = (said | {tokenizer.eos_token_id} | end_of_turn(tokenizer)) - {None}
    return None if ends == said else sorted(ends)
