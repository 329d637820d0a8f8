"""The built wheel in bare environments. It installs torch anew, so it only runs where asked: `make wheel-test`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PREPARE = "import torch, transformers; from moa.assets import base_path\n"
BASE = 'base = transformers.AutoModelForCausalLM.from_pretrained(base_path(), dtype="float32")\n'
CHECK = """
import sys
loaded = {"trl", "datasets", "typer", "rich", "scipy", "pandas"} & sys.modules.keys()
assert not loaded, loaded
inputs = torch.tensor([[5, 6, 7]])
assert model(inputs).logits.shape == (1, 3, base.config.vocab_size)
print("works with", transformers.__version__)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("MOA_WHEEL_TEST" not in os.environ, reason="downloads torch: make wheel-test"),
]


def run(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    return result.returncode, result.stdout + result.stderr


def succeed(*command, **options):
    code, output = run(*command, **options)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    succeed(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    return next(folder.glob("moa_lm-*.whl"))


@pytest.fixture(scope="module", params=["constraints.txt", "constraints-oldest.txt"])
def bare(request, wheel, tmp_path_factory):
    """A Python with nothing but the wheel and its core requirements."""
    folder, constraints = tmp_path_factory.mktemp("bare"), ROOT / request.param
    torch = re.search(r"^torch==.*", constraints.read_text(), re.MULTILINE).group()
    succeed(sys.executable, "-m", "venv", folder)
    succeed(folder / "bin" / "pip", "install", torch)
    succeed(folder / "bin" / "pip", "install", "-c", constraints, wheel)
    return folder / "bin"


def test_the_snippet_of_the_readme_runs(bare, tmp_path):
    snippet = re.search(r"```python\n(import moa\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in snippet.splitlines() if line]) == 5
    code = PREPARE + BASE + snippet + CHECK
    assert "works with" in succeed(bare / "python", "-c", code, cwd=tmp_path)


def test_the_command_names_its_extra(bare, tmp_path):
    """Newer releases of transformers bring typer, so the command may start; training still needs the extra."""
    code, output = run(bare / "moa", "train", "embedded-soft-moa", cwd=tmp_path)
    assert code in (1, 2)
    assert "pip install 'moa-lm[train]'" in output
    assert "Traceback" not in output


def test_an_adapter_loads_without_importing_moa(bare, tmp_path):
    code = PREPARE + BASE + "import moa, peft; peft.get_peft_model(base, moa.preset('soft-moa')).save_pretrained('a')"
    succeed(bare / "python", "-c", code, cwd=tmp_path)
    code = "from transformers import AutoModelForCausalLM as A; print('\\n'.join(A.from_pretrained('a').state_dict()))"
    assert ".moa_A." in succeed(bare / "python", "-c", code, cwd=tmp_path)
