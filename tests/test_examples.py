"""The scripts in `examples/` run as they stand, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments, timeout=300):
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_peft_swap(tmp_path):
    output = run("peft_swap.py", "--steps", "5", "--output", str(tmp_path))
    assert "trainable params" in output
    assert "answer:" in output
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_custom_family():
    output = run("custom_family.py")
    assert "without architecture=: attention.query_key_value (96 outputs) of block 0 holds q and k and v" in output
    assert "identical to the base before training: True" in output
    assert "the same after saving and loading: True" in output


@pytest.mark.serve
@pytest.mark.timeout(1800)
def test_grpo_served(tmp_path):
    """In the environment of `make serve-test`: the reward rises, and server and trainer agree on what was written."""
    pytest.importorskip("vllm")
    output = run("grpo_served.py", "--output", str(tmp_path), timeout=1800)
    first, last = map(float, re.findall(r"(0\.\d+) in the", output))
    assert last > first + 0.02
    assert float(re.search(r"by at most (\S+)", output)[1]) < 1e-3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    assert [script.name for script in EXAMPLES.glob("*.py") if f'run("{script.name}"' not in tested] == []
