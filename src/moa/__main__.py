"""The console script ``moa``, also ``python -m moa``."""

from __future__ import annotations

import sys

from moa.extras import MissingExtra, extra


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        with extra("train"):
            from moa.cli import app
    except MissingExtra as missing:
        sys.exit(f"moa: {missing}")
    app(prog_name="moa")


if __name__ == "__main__":
    import moa_command  # which sets what must be set before torch is loaded

    moa_command.main()
