"""What plug-ins share, and what is refused. The tools themselves are run by `make hosts`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from peft import get_peft_model
from tiny import tiny_llama
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

import moa
from moa.integrations.settings import mixture, refuse_lora

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "hosts"


@pytest.mark.parametrize(
    "section",
    ["soft-moa", {"preset": "soft-moa", "r": 4}, '{"preset": "soft-moa", "r": 4}', {"experts": [{"kind": "prompt"}]}],
)
def test_a_section_is_a_name_a_mapping_or_json(section):
    assert isinstance(mixture(section), moa.MoAConfig)


@pytest.mark.parametrize("section", [None, {}, 3, ["soft-moa"]])
def test_a_section_that_is_none_of_these_is_refused(section):
    with pytest.raises(ValueError, match="must be a preset's name"):
        mixture(section)


def test_a_wrong_key_is_named():
    with pytest.raises(ValueError, match=r"no setting 'rr'.*'r'"):
        mixture({"preset": "soft-moa", "rr": 4})


def test_settings_of_lora_are_refused_by_name():
    refuse_lora([])
    with pytest.raises(ValueError, match=r"lora_alpha, lora_r: .*moa section"):
        refuse_lora(["lora_r", "lora_alpha"])


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_name_a_mixture_and_the_documentation_shows_them(file):
    settings = yaml.safe_load(file.read_text())
    assert file.stem == "swift" or isinstance(mixture(settings["moa"]), moa.MoAConfig)
    assert f'"examples/hosts/{file.name}"' in (ROOT / "docs" / "howto" / "hosts.md").read_text()


def test_every_host_is_pinned_and_documented():
    pins = re.findall(r"^HOST_(\w+) := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {name for name, _ in pins} == {file.stem for file in EXAMPLES.glob("*.yaml")} | {"lm_eval"}
    page = (ROOT / "docs" / "howto" / "hosts.md").read_text()
    assert (EXAMPLES / "swift_plugin.py").read_text() in page
    assert all(requirement.partition("==")[2] in page for _, requirement in pins)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_trl_scripts_get_the_mixture(monkeypatch, script):
    trl = pytest.importorskip("trl")
    from moa.integrations import trl as plugin

    seen = {}
    monkeypatch.setattr(trl, "ModelConfig", trl.ModelConfig)
    monkeypatch.setattr(trl, "get_peft_config", trl.get_peft_config)
    monkeypatch.setattr(plugin.runpy, "run_module", lambda name, run_name: seen.update(name=name, argv=sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["trl", script, "--moa", "sparse-moa"])
    plugin.main()
    assert seen == {"name": f"trl.scripts.{script}", "argv": ["--moa", "sparse-moa"]}
    (arguments,) = trl.TrlParser((trl.ModelConfig,)).parse_args_and_config(sys.argv[1:])
    assert trl.get_peft_config(arguments) == moa.preset("sparse-moa")
    with pytest.raises(ValueError, match="name a mixture"):
        trl.get_peft_config(trl.ModelConfig())
    with pytest.raises(ValueError, match="lora_r: a mixture does not read"):
        trl.get_peft_config(trl.ModelConfig(moa="soft-moa", lora_r=4))


def test_trl_scripts_that_are_not_there_are_refused(monkeypatch):
    pytest.importorskip("trl")
    from moa.integrations import trl as plugin

    monkeypatch.setattr(sys, "argv", ["trl", "vllm-serve"])
    with pytest.raises(SystemExit, match=r"usage: .*sft"):
        plugin.main()


@pytest.mark.parametrize("cls", [LlamaAttention, LlamaForCausalLM])
def test_a_model_with_forwards_of_unsloth_is_refused(monkeypatch, cls):
    def fast_forward(self, *args, **kwargs):
        raise AssertionError

    fast_forward.__module__ = "unsloth.models.llama"
    model = tiny_llama()
    before = set(model.state_dict())
    monkeypatch.setattr(cls, "forward", fast_forward)
    with pytest.raises(ValueError, match=f"Unsloth has replaced {cls.__name__}.forward"):
        get_peft_model(model, moa.preset("soft-moa"))
    assert set(model.state_dict()) == before


@pytest.fixture
def alone():
    """A process group of one, on gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_base_that_is_sharded_already_is_refused():
    """What is attached after sharding is never synchronised; before it, all is well (`test_distributed.py`)."""
    model = tiny_llama()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is a DTensor.*Attach the adapter first"):
        get_peft_model(model, moa.preset("soft-moa"))
    attached = get_peft_model(tiny_llama(), moa.preset("soft-moa"))
    fully_shard(attached)
    with pytest.raises(ValueError, match="Attach the adapter first"):
        attached.add_adapter("second", moa.preset("lora"))


def test_a_base_under_tensor_parallelism_is_refused():
    model = tiny_llama()
    model._tp_size = 2  # as from_pretrained(tp_plan="auto") in two processes
    with pytest.raises(ValueError, match="tp_size=2"):
        get_peft_model(model, moa.preset("soft-moa"))


def test_plugins_are_short():
    """Under 60 lines each: more would be a second integration of the tool."""
    plugins = [ROOT / "src" / "moa" / "integrations" / f"{file.stem}.py" for file in EXAMPLES.glob("*.yaml")]
    assert {file.stem: n for file in plugins if (n := len(file.read_text().splitlines())) >= 60} == {}
