"""Plan files: our own JSON, and the two-key files published with the paper. Data only, nothing is executed.

Ours says everything needed to apply it: format version, head kind, sink, block, model, convention, evidence. A
published file holds ``alphas`` and ``betas`` per *query* head and leaves the rest to its reader: sink and block are 64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa.files import read_json, write_text

VERSION = 1
OURS = "span_plan.json"
PUBLISHED = "moa_alpha_beta.json"
RULE_KEYS = {"alphas", "betas"}


def find(path: Path) -> Path:
    """The plan file that ``path`` means: itself, or the one a directory or output folder of `moa spans` holds.

    Raises:
        FileNotFoundError: there is no such path, or its directory holds no plan or several.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such plan file or directory")
    if not path.is_dir():
        return path
    for name in (OURS, PUBLISHED):
        if (path / name).is_file():
            return path / name
    below = sorted(path.glob(f"density-*/{OURS}"))
    if len(below) > 1:
        raise FileNotFoundError(f"{path}: plans of several densities, name one of {[str(file) for file in below]}")
    if below:
        return below[0]
    raise FileNotFoundError(f"{path}: a directory without {OURS} or {PUBLISHED}; name the file itself")


def read(path: Path) -> dict[str, Any]:
    """The fields of a plan in ``path``, of either format.

    Raises:
        ValueError: not JSON, not an object, or keys of neither format; the message names the file.
    """
    content = read_json(path, "span plan")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a plan is a JSON object, not {type(content).__name__}")
    if missing := sorted(RULE_KEYS - content.keys()):
        raise ValueError(f"{path}: not a span plan, no {' and no '.join(missing)}; it has {sorted(content)[:10]}")
    if content.keys() == RULE_KEYS:
        return {**content, "heads": "query", "convention": "published"}
    if content.get("format_version") != VERSION:
        found = content.get("format_version")
        raise ValueError(
            f"{path}: format_version {found!r}; this version of moa reads {VERSION}, and files with exactly "
            f"{sorted(RULE_KEYS)}"
        )
    return content


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a plan file, creating its folder; it appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
