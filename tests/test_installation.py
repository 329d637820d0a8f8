"""What the distribution promises: a small core, extras that are named when missing, and loading without an import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import through_transformers, tiny_llama, tiny_moa

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NOT_CORE = ["trl", "datasets", "typer", "rich", "scipy", "pydantic"]

# (package that is missing, the extra that has it) -> code that needs it
NEEDS = {
    ("pydantic", "train"): "import moa.settings",
    ("trl", "train"): "import moa.training.sft",
    ("datasets", "train"): "from moa.data import load_rows; load_rows('owner/name', split='train')",
    ("typer", "train"): "from moa.__main__ import main; main()",
    ("rich", "train"): "from moa.__main__ import main; main()",
    ("scipy", "train"): "from moa.evaluation.accuracy import wilson; wilson(1, 2)",
    ("scipy", "bench"): "import moa.studies.statistics",
    ("joblib", "bench"): "import moa.studies.engine",
    ("scipy", "search"): "import moa.spans.search.pricing",
    ("jinja2", "report"): "import moa.report.page",
}

BLOCKED = """
import json, sys
said = []
for package, code in json.loads(sys.argv[1]):
    there = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    sys.modules |= dict.fromkeys([package, *there])
    try:
        exec(code)
        said.append("no error")
    except (ModuleNotFoundError, SystemExit) as error:
        said.append(str(error))
    del sys.modules[package]
    sys.modules |= there
print(json.dumps(said))
"""

# Every way in a fork of its own, so that none finds what another one has imported.
AUTOLOAD = """
import os, sys
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base, adapter, *ways = sys.argv[1:]
assert "moa" not in sys.modules, "imported before it was needed"
for way in ways[:-1]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, way
    else:
        ways = [way]
        break
way = ways[-1]
if way == "PeftModel":
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
elif way == "AutoPeftModel":
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
elif way == "transformers":
    model = AutoModelForCausalLM.from_pretrained(adapter)
elif way == "load_adapter":
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(adapter)
print(way, float(sum(p.double().sum() for name, p in model.named_parameters() if ".moa_" in name)), flush=True)
"""

BYSTANDER = """
import sys
import peft, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(target_modules=["q_proj"]))
print("moa" in sys.modules, sorted(name for name in sys.modules if "moa" in name))
try:
    peft.PeftConfig.from_peft_type(peft_type="NOBODY")
except KeyError as error:
    print("KeyError", error)
"""


def run(code, *arguments, **environment):
    """A fresh interpreter; returns its output, or raises with what it said."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, an adapter for it, and the sum of the adapter's parameters."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model = tiny_moa()
    total = sum(p.detach().double().sum() for name, p in model.named_parameters() if ".moa_" in name)
    tiny_llama().save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    return base, adapter, float(total)


def test_the_core_imports_without_any_extra():
    blocked = "".join(f"sys.modules[{name!r}] = None;" for name in NOT_CORE)
    assert run(f"import sys; {blocked} import moa; print(moa.preset('soft-moa').peft_type)") == "PeftType.MOA"


@pytest.mark.skipif(
    any(find_spec(package) is None for package, _ in NEEDS),
    reason="in an environment without extras the first one that is asked for is named, whichever else is missing",
)
def test_a_missing_extra_is_named():
    cases = [(package, code) for (package, _), code in NEEDS.items()]
    answers = json.loads(run(BLOCKED, json.dumps(cases)))
    for (package, extra), said in zip(NEEDS, answers, strict=True):
        assert f"needs the package '{package}'" in said
        assert f"pip install 'moa-lm[{extra}]'" in said
        assert any(requirement.startswith(package) for requirement in EXTRAS[extra])


def test_all_is_every_extra_for_users():
    named = EXTRAS["all"][0].removeprefix("moa-lm[").removesuffix("]").split(",")
    # A cluster, and an engine that chooses its own torch, are installed where they run.
    assert set(named) == EXTRAS.keys() - {"all", "dev", "docs", "ray", "serve"}


def test_the_entry_point_is_installed():
    """The tests below need it; a source tree on the path alone does not have it: `make install`."""
    assert "moa_autoload:install" in [entry.value for entry in entry_points(group="torch.backends")]


@pytest.mark.parametrize(
    "ways", [["PeftModel", "AutoPeftModel"], pytest.param(["transformers", "load_adapter"], marks=through_transformers)]
)
def test_an_adapter_loads_without_importing_moa(folders, ways):
    base, adapter, total = folders
    found = [line.split() for line in run(AUTOLOAD, base, adapter, *ways).splitlines()]
    assert [way for way, _ in found] == ways
    assert [float(one) for _, one in found] == pytest.approx([total] * len(ways))


def test_it_can_be_switched_off(folders):
    base, adapter, _ = folders
    with pytest.raises(AssertionError, match="KeyError: 'MOA'"):
        run(AUTOLOAD, base, adapter, "PeftModel", MOA_AUTOLOAD="0")


def test_other_programs_do_not_notice():
    assert run(BYSTANDER).splitlines() == ["False ['moa_autoload']", "KeyError 'NOBODY'"]


def test_a_failure_inside_does_not_break_torch():
    """PEFT without the table, as a future release might be: torch and PEFT import as ever."""
    code = """
    import sys, types
    import moa_autoload
    moa_autoload.TABLE = "NOT_THERE"
    import peft
    print(type(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING).__name__)
    """
    assert run(code.replace("\n    ", "\n")) == "dict"
