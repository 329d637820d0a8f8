"""MoA: heterogeneous mixtures for Hugging Face language models. Importing registers the method with PEFT."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

# While `python -m moa` looks for the package, this is what the arguments are.
_is_command = "moa_command" in sys.modules or (
    sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") :][1:2] == ["moa"]
)

if TYPE_CHECKING or not _is_command:
    from moa.library import *  # noqa: F403
    from moa.library import __all__ as __all__
else:
    # In the process of the command ``moa``, which answers a help page or a slip without loading torch.

    def __getattr__(name: str) -> Any:
        library = importlib.import_module("moa.library") if not name.startswith("_") else None
        if name not in getattr(library, "__all__", ()):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(library, name)
