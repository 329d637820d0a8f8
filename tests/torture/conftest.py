"""Command lines that every kind of fault is tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Command, prepared


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_rows: Path) -> dict[str, Command]:
    return prepared(tmp_path_factory.mktemp("commands"), tiny_base, tiny_rows)
