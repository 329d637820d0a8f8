"""Lets PEFT find MoA by itself: an adapter of type ``MOA`` is loaded without anybody having imported ``moa``.

PEFT has no plug-ins; it looks methods up by name in a table. `install` is an entry point of the group
``torch.backends``, so torch calls it at the end of its own import, in every program of this environment. It does no
more than wait for PEFT: the table of configurations becomes one that imports ``moa`` when it is asked for ``MOA`` for
the first time. A program that loads no mixture never imports ``moa``. ``MOA_AUTOLOAD=0`` in the environment switches it
off; ``docs/howto/autoload.md`` says what it costs and what change in PEFT would replace it.

A module of its own outside of the package, because importing anything of ``moa`` imports torch. Nothing here may raise:
an exception would be one of ``import torch``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "PEFT_TYPE_TO_CONFIG_MAPPING"


class Methods(dict[Any, Any]):
    """PEFT's table of configuration classes; the first look-up of ``MOA`` imports ``moa``, which enters itself."""

    def __missing__(self, name: Any) -> Any:
        if name == "MOA":
            import moa  # noqa: F401

            if name in self:
                return self[name]
        raise KeyError(name)


class WhenPeftLoads:
    """A finder on ``sys.meta_path`` that finds nothing but ``peft.mapping``, once, and steps aside."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft.mapping":
            return None
        with suppress(Exception):
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.loader is not None:
                _after(spec.loader, _lend_table)
                return spec
        return None


def _after(loader: Any, then: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        with suppress(Exception):
            then(module)

    loader.exec_module = exec_module


def _lend_table(mapping: ModuleType) -> None:
    setattr(mapping, TABLE, Methods(getattr(mapping, TABLE)))


def install() -> None:
    """Wait for PEFT; does nothing if PEFT is there already, or with ``MOA_AUTOLOAD=0``."""
    with suppress(Exception):
        if os.environ.get("MOA_AUTOLOAD") != "0" and "peft.mapping" not in sys.modules:
            sys.meta_path.insert(0, WhenPeftLoads())  # type: ignore[arg-type]


def tell_vllm() -> None:
    """Entry point of the group ``vllm.general_plugins``, called in every process of vLLM's. Does not import ``moa``."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("MoAForCausalLM", "moa.serving.vllm:MoAForCausalLM")
