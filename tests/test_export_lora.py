"""`moa export --to lora` computes the same as the adapter, or refuses."""

from __future__ import annotations

import pytest
from families import build_family
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logits, perturb, tiny_llama, tiny_moa
from typer.testing import CliRunner

import moa
from moa.cli import app
from moa.integrations.lora import to_lora

EXACT = {
    "preset": {"experts": [moa.LoraExpert(r=4, alpha=8)]},
    "ranks and scalings": {
        "experts": [moa.LoraExpert(["q", "v"], r=2, alpha=3), moa.LoraExpert(["down", "o"], r=5, alpha=4, rslora=True)]
    },
    "one block": {"experts": [moa.LoraExpert(["q", "up"], layers=[1]), moa.LoraExpert(["q"], r=3, layers=[0])]},
}


@pytest.mark.parametrize("name", EXACT)
def test_lora_experts_without_a_router_become_lora(tmp_path, name):
    model = tiny_moa(moa.MoAConfig(router=None, **EXACT[name]))
    expected = logits(model)
    model.save_pretrained(tmp_path / "ours")
    to_lora(tmp_path / "ours", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert isinstance(loaded.active_peft_config, LoraConfig)
    assert (logits(tiny_llama()) - expected).abs().max() > 0.1
    assert logits(loaded).sub(expected).abs().max() < 1e-4
    assert logits(loaded.merge_and_unload()).sub(expected).abs().max() < 1e-4


def test_modules_are_named_as_serving_engines_like(tmp_path):
    tiny_moa(moa.MoAConfig(router=None, experts=[moa.LoraExpert(["q", "down"])])).save_pretrained(tmp_path / "ours")
    assert set(to_lora(tmp_path / "ours", tmp_path / "lora").target_modules) == {"q_proj", "down_proj"}


@pytest.mark.parametrize("name", ["soft-moa", "molora", "prompt", "parallel-adapter"])
def test_what_is_not_lora_is_refused(tmp_path, name):
    get_peft_model(tiny_llama(), moa.preset(name)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="this adapter is not LoRA"):
        to_lora(tmp_path / "ours", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_part_of_a_fused_projection_is_refused(tmp_path):
    config = moa.MoAConfig(router=None, experts=[moa.LoraExpert(["q"])])
    perturb(get_peft_model(build_family("phi3"), config)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"qkv_proj is a fused projection"):
        to_lora(tmp_path / "ours", tmp_path / "lora")


def test_other_adapters_are_refused(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="not a Mixture of Adapters"):
        to_lora(tmp_path / "ours", tmp_path / "lora")


def test_the_command(tmp_path):
    tiny_moa(moa.MoAConfig(router=None, experts=[moa.LoraExpert(["q"], r=3)])).save_pretrained(tmp_path / "ours")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "ours"), "--to", "lora", "--output", str(tmp_path / "lora")]
    )
    assert done.exit_code == 0
    assert "rank 3, on q_proj" in done.output
