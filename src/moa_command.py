"""Where the command ``moa`` starts: outside of the package, since importing ``moa`` anywhere else loads torch.

Where this module is loaded, ``import moa`` waits with that until a verb needs it: help pages and mistakes do not.

OpenMP reads its settings when torch is loaded. By default a thread that waits for others spins, so on a machine that is
busy with something else, too, a training step takes many times as long. ``OMP_WAIT_POLICY`` in the environment has
precedence.
"""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line, see `moa.__main__`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from moa.__main__ import main as run

    run()


if __name__ == "__main__":
    import moa_command  # under its own name, by which the package knows that it is the command's

    moa_command.main()
