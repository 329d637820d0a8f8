"""``moa env``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import typer

_PACKAGES = (
    "moa-lm",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "bitsandbytes",
)


def env() -> None:
    """Print versions, devices and memory, for a bug report."""
    lines = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    for name, value in (lines | _machine()).items():
        typer.echo(f"{name}: {value}")


def _machine() -> dict[str, str]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found = {
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here",
        "cuda": torch.version.cuda or "torch was built without it",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"device {index}"] = f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    return found
