"""Which releases of vLLM are known to work, and by which names it knows us."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

ARCHITECTURE = "MoAForCausalLM"
WORKER = "moa.serving.vllm_worker.MoAWorker"
"""Needed where there are several mixtures."""

TESTED = SpecifierSet(">=0.32,<0.33")
"""The releases that `make serve-test` has passed on."""


def check_release(version: str) -> None:
    """Raise ValueError if vLLM is none of the releases that are known to work."""
    if not TESTED.contains(version, prereleases=True):
        raise ValueError(
            f"vLLM {version} has not been tried with MoA, whose plug-in relies on how vLLM builds its models. Releases "
            f"that work: {TESTED}; pip install 'vllm{TESTED}'"
        )
