"""Which versions pip picks for MoA beside each of the given requirements (`make hosts-resolve`); nothing is installed.

python scripts/resolve_hosts.py TORCH REQUIREMENT...
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = ("moa-lm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def resolved(torch: str, host: str) -> dict[str, str]:
    """Package -> version, for those in `SHOWN`; pip's own error ends the program."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*command, torch, *host.split(), str(ROOT)], stdout=subprocess.PIPE, check=False)
    if report.returncode:
        sys.exit(f"pip finds no versions for MoA beside {host}")
    found = [package["metadata"] for package in json.loads(report.stdout)["install"]]
    return {package["name"].lower(): package["version"] for package in found if package["name"].lower() in SHOWN}


for requirement in sys.argv[2:]:
    versions = resolved(sys.argv[1], requirement)
    print(f"{requirement}: " + ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions), flush=True)
