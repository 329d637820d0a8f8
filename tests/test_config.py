"""Configurations: what they accept, what they refuse and how they say it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from families import build_family
from peft import get_peft_model

import moa
from moa import LoraExpert, MoAConfig, ParallelExpert, PromptExpert, Router, Threshold
from moa.adapters.presets import PRESETS
from moa.adapters.telemetry import gate_values

BAD_CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"experts": []}, "nothing to train"),
    (
        {"experts": ["lorra"]},
        "'lorra' is not one of ['adapter', 'ia3', 'lora', 'parallel', 'prompt'] (did you mean 'lora'?)",
    ),
    ({"experts": [{"kind": "lora", "rank": 8}]}, "has no field 'rank'"),
    ({"experts": [{"kind": "lora", "r": 0}]}, "r=0 is outside of [1, inf]"),
    ({"experts": [{"kind": "lora", "dropout": 2}]}, "dropout=2 is outside of [0, 1]"),
    ({"experts": [{"kind": "lora", "targets": ["query"]}]}, "'query'"),
    ({"experts": [{"kind": "lora", "targets": []}]}, "targets=[]"),
    ({"experts": [{"kind": "lora", "targets": {"q"}}]}, "targets={'q'} must be a list"),
    ({"experts": [{"kind": "lora", "targets": 3}]}, "targets=3 must be a list"),
    ({"experts": [{"kind": "lora", "layers": []}]}, "lora expert: layers=[] must be the number of a block"),
    ({"experts": [{"kind": "lora", "layers": -1}]}, "lora expert: layers=-1 must be"),
    ({"experts": [{"kind": "lora", "layers": {0}}]}, "lora expert: layers={0} must be"),
    ({"experts": [{"kind": "lora", "layers": "all"}]}, "lora expert: layers='all' must be"),
    ({"experts": [{"kind": "lora", "gate": 1}]}, "lora expert: gate=1 must be a name"),
    ({"experts": [{"kind": "lora", "rslora": "no"}]}, "rslora='no' must be True or False"),
    ({"experts": [{"kind": "lora", "optional": None}]}, "optional=None must be True or False"),
    ({"experts": [{"kind": "lora", "copies": {"number": 2, "shared": "no"}}]}, "shared='no' must be True or False"),
    ({"experts": [{"kind": "lora", "copies": {"number": 2, "bias": 1}}]}, "copies: bias=1 must be True or False"),
    ({"gating": {"kind": "threshold", "constant": 0.5}}, "constant=0.5 must be True or False"),
    ({"gating": {"kind": "threshold", "renormalise": "no"}}, "renormalise='no' must be True or False"),
    ({"router": {"bias": "no"}}, "router: bias='no' must be True or False"),
    ({"init_weights": "pissa"}, "init_weights='pissa' must be True or False"),
    ({"architecture": {"q": 1}}, "architecture: q=1 must be a path"),
    ({"architecture": {"mask_hides": "no"}}, "mask_hides='no' must be True or False"),
    ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' must be a list"),
    ({"modules_to_save": {"lm_head": 1}}, "must be a list"),
    ({"trainable_token_indices": 5.5}, "trainable_token_indices=5.5 must be the number of a token"),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices=[-1] must be"),
    ({"trainable_token_indices": {"embed_tokens": "x"}}, "trainable_token_indices='x' must be"),
    ({"trainable_token_indices": ""}, "trainable_token_indices='' must be"),
    ({"experts": [{"kind": "lora", "targets": ["q", "q"]}]}, "twice"),
    ({"experts": [{"kind": "parallel", "size": -1}]}, "size=-1"),
    ({"experts": [{"kind": "parallel", "activation": "sillu"}]}, "did you mean 'silu'"),
    ({"experts": [{"kind": "parallel", "activation": "prelu"}]}, "activation='prelu' is not one of"),
    ({"experts": [{"kind": "prompt", "length": 0}]}, "length=0"),
    ({"experts": [{"kind": "lora", "copies": 0}]}, "copies: number=0"),
    ({"experts": [{"kind": "lora", "copies": {"number": 2, "gating": {"kind": "topk", "k": 3}}}]}, "k=3"),
    ({"gating": "hard"}, "gating: kind='hard'"),
    ({"gating": {"kind": "threshold", "gamma": 1}}, "did you mean 'gamma_max'"),
    ({"router": {"inputs": "block"}}, "did you mean 'input'"),
    ({"router": {"level": "sentence"}}, "level='sentence' is not one of"),
    ({"architecture": {"layers": "h"}}, "architecture has no field 'layers'"),
    ({"format_version": 99}, "upgrade moa"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGURATIONS)
def test_bad_configurations_name_the_value_and_the_way_out(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MoAConfig(**fields)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name: str, tmp_path: Any) -> None:
    config = moa.preset(name)
    config.save_pretrained(tmp_path)
    assert MoAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_preset_twice_is_two_objects() -> None:
    first, second = moa.preset("soft-moa"), moa.preset("soft-moa")
    first.experts[0].r = 99
    first.router.level = "instance"
    assert second.experts[0].r == 8
    assert second.router.level == "token"


def test_overrides_reach_experts_and_configuration() -> None:
    config = moa.preset("soft-moa", r=4, size=32, gating=Threshold(gamma_max=0.2))
    assert config.experts[0].r == 4
    assert config.experts[2].size == 32
    assert config.gating.gamma_max == 0.2


def test_a_dict_changes_only_the_fields_it_names() -> None:
    assert moa.preset("instance-moa", router={"input": "attention"}).router == Router(
        4, level="instance", initial_logit=0
    )
    assert moa.preset("sparse-moa", gating={"gamma_max": 0.2}).gating == Threshold(gamma_max=0.2)
    assert moa.preset("sparse-moa", gating={"kind": "topk", "k": 3}).gating == moa.TopK(k=3)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [("soft_moa", {}, "did you mean 'soft-moa'"), ("soft-moa", {"rr": 4}, "has no setting 'rr'")],
)
def test_unknown_presets_and_settings(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        moa.preset(name, **overrides)


@pytest.mark.parametrize(
    ("family", "expert", "words"),
    [
        ("mixtral", LoraExpert(["down"]), ["lora", "'down'", "mixtral", "stacked", "parallel expert"]),
        ("gpt_oss", LoraExpert(["up"]), ["lora", "'up'", "gpt_oss", "offers"]),
        ("opt", LoraExpert(["gate"]), ["lora", "'gate'", "opt", "targets"]),
        ("falcon", PromptExpert(), ["prompt", "falcon", "attention interface", "Leave that expert out"]),
        ("bloom", PromptExpert(), ["prompt", "bloom"]),
        ("mpt", PromptExpert(), ["prompt", "mpt"]),
        ("llama", LoraExpert(layers=[2]), ["layers=[2]", "2 blocks"]),
        ("llama", LoraExpert(layers=2), ["layers=[2]", "2 blocks"]),
        ("llama", LoraExpert(layers=range(1, 4)), ["layers=[2, 3]", "2 blocks"]),
    ],
)
def test_what_a_family_cannot_host_is_named_before_the_model_is_touched(
    family: str, expert: Any, words: list[str]
) -> None:
    model = build_family(family)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        get_peft_model(model, MoAConfig(experts=[ParallelExpert(), expert]))
    for word in words:
        assert word in str(error.value)
    assert [name for name, _ in model.named_modules()] == names


def test_blocks_that_cannot_be_found_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"no ModuleList's path ends with blocks='decoder'; there are \['model.layers'\]"
    ):
        get_peft_model(build_family("llama"), moa.preset("lora", architecture={"blocks": "decoder"}))


@pytest.mark.parametrize("hidden", [0, 4])
def test_gates_start_where_initial_logit_says(hidden: int) -> None:
    def gates(**settings: float) -> torch.Tensor:
        torch.manual_seed(0)
        router = Router(hidden, **settings)
        model = get_peft_model(build_family("llama"), MoAConfig(experts=[LoraExpert(["q", "v"])], router=router))
        with gate_values(model) as record:
            model(torch.tensor([[1, 2, 3]]))
        return record.gates[0]

    torch.testing.assert_close(gates(initial_logit=2.0).logit(), gates(initial_logit=0.0).logit() + 2)
    with pytest.raises(ValueError, match="initial_logit=1 needs bias=True"):
        Router(bias=False, initial_logit=1)


def test_router_width_follows_the_number_of_gates() -> None:
    model = get_peft_model(build_family("llama"), MoAConfig(experts=[LoraExpert(["q", "v"])], router=Router(4)))
    mixture = model.base_model.model.model.layers[0].mixture
    assert mixture.moa_w1["default"].weight.shape == (4 * 2, 32)
    assert mixture.moa_w2["default"].weight.shape == (2, 4 * 2)
