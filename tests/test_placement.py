"""Finding the parts of a block, and adapting a default configuration to them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from families import DECODERS, SIZES, build_decoder, build_family
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

import moa
from moa import Copies, LoraExpert, MoAConfig, ParallelExpert, PromptExpert, TopK
from moa.adapters.architectures import BlockView
from moa.adapters.decoder import view_blocks

FALCON = {"alibi": False, "bias": True}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "openai-gpt": ("openai-gpt", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "bloom": ("bloom", {}),
    "persimmon": ("persimmon", {}),
    "mpt": ("mpt", {}),
    "codegen": ("codegen", {"num_attention_heads": 8}),
    "bigcode of one KV head": ("gpt_bigcode", {"multi_query": True}),
    "bigcode of many": ("gpt_bigcode", {"multi_query": False}),
    "falcon of one KV head": ("falcon", FALCON | {"multi_query": True}),
    "falcon of grouped heads": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon of many": ("falcon", FALCON | {"multi_query": False}),
    "keys and values of jetmoe": ("jetmoe", {}),
    "latent keys and values": ("minicpm3", DECODERS["minicpm3"].settings),
}


def hosting(name: str, config: Any = None, **settings: Any) -> PeftModel:
    """A family with a mixture, warnings ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(build_decoder(name, settings), config or moa.preset("soft-moa")).eval()


def placed(model: PeftModel) -> list[tuple[str, list[str] | None, list[int] | None]]:
    return [(e.kind, getattr(e, "targets", None), e.layers) for e in model.peft_config["default"].experts]


def rows_of(view: BlockView, role: str) -> Tensor:
    """Which outputs of its host belong to ``role``: a boolean vector."""
    host = view.host(role)
    assert host is not None
    assert host.part is not None
    rows = torch.zeros(host.module(torch.zeros(1, host.in_features)).shape[-1], dtype=torch.bool)
    slots = rows.view(host.part.groups, host.part.slots, -1)
    slots[:, host.part.start : host.part.stop] = True
    assert rows.sum() == host.out_features
    return rows


@pytest.mark.parametrize("family", FUSED)
def test_a_part_of_a_fused_projection_is_that_part(family: str) -> None:
    """The first token's query moves nothing, its key only other tokens, its value itself too; together they are all."""
    name, settings = FUSED[family]
    model = build_decoder(name, settings)
    view = next(iter(view_blocks(model, None).values()))
    roles = [role for role in ("q", "k", "v") if getattr(view.architecture, role) == view.architecture.k]
    rows = {role: rows_of(view, role) for role in roles}
    assert (sum(r.int() for r in rows.values()) == 1).all()  # type: ignore[union-attr, attr-defined]
    plain = attended(model, view, None)
    for role in roles:
        moved = (attended(model, view, rows[role]) - plain).abs().amax(-1)
        assert (moved[0] > 1e-4) == (role == "v"), role
        assert (moved[1:] > 1e-5).any() == (role != "q"), role


def attended(model: nn.Module, view: BlockView, rows: Tensor | None) -> Tensor:
    """Outputs (tokens, features) of the block's attention if ``rows`` of the first token's projections are other."""
    host, outputs = view.host("k"), []
    assert host is not None
    assert view.attention is not None

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0))
        first = (torch.arange(output.shape[-2]) == 0).unsqueeze(-1)
        return output + first * noise * rows

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [view.attention.register_forward_hook(keep)]
    if rows is not None:
        handles.append(host.module.register_forward_hook(disturb))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 9, 4, 7, 30]]))
    for handle in handles:
        handle.remove()
    return outputs[0].squeeze(0)


def test_a_family_that_nobody_named_is_found_by_its_structure() -> None:
    model = build_family("llama")
    model.config.model_type = "lama"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot host.*")
        adapted = get_peft_model(model, moa.preset("soft-moa"))
    assert placed(adapted) == [
        ("lora", ["q", "k", "v", "o", "down"], None),
        ("prompt", None, None),
        ("parallel", None, None),
    ]


class Scaled(nn.Module):
    """What quantised layers look like: features, but no `nn.Linear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Parameter((linear.weight * 8).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) / 8)


def test_layers_that_only_act_as_linear_ones_are_hosts() -> None:
    model = build_family("llama")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Scaled(child))
    adapted = get_peft_model(model, MoAConfig(experts=[LoraExpert(["q", "k", "v", "o", "gate", "up", "down"])]))
    adapted(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_an_order_that_no_shape_tells_has_to_be_said() -> None:
    model = build_family("phi3")
    model.config.model_type = "phi33"
    with pytest.raises(
        ValueError, match=r"self_attn.qkv_proj \(64 outputs\) of block 0 holds q and k and v .*qkv_layout"
    ):
        get_peft_model(model, moa.preset("lora"))
    adapted = get_peft_model(model, moa.preset("lora", architecture={"qkv_layout": "concatenated"}))
    assert placed(adapted)[0][1] == ["q", "k", "v", "o", "down"]
    with pytest.raises(ValueError, match=r"qkv_layout='per_heads'.*did you mean 'per_head'"):
        moa.preset("lora", architecture={"qkv_layout": "per_heads"})


def test_a_module_that_cannot_be_told_is_asked_for_with_what_there_is() -> None:
    model = build_family("llama")
    for layer in model.model.layers:
        layer.self_attn.mystery = layer.self_attn._modules.pop("v_proj")
    words = r"not sure which module of block 0 of llama is 'v'.*self_attn.mystery \(32 -> 16\).*architecture=\{'v':"
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, moa.preset("lora"))
    adapted = get_peft_model(model, moa.preset("lora", architecture={"v": "self_attn.mystery"}))
    assert placed(adapted)[0][1] == ["q", "k", "v", "o", "down"]


def test_a_path_that_no_block_has_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"no decoder block has a module 'self_attn.wq' \(q\).*self_attn.q_proj \(32 -> 32\)"
    ):
        get_peft_model(build_family("llama"), moa.preset("lora", architecture={"q": "self_attn.wq"}))


def test_blocks_that_share_a_module_are_refused() -> None:
    model = build_family("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"model.layers.0 and model.layers.1 share one mlp module"):
        get_peft_model(model, moa.preset("soft-moa"))


def test_defaults_that_do_not_fit_are_left_out_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="cannot host all") as caught:
        model = get_peft_model(build_decoder("dots1", {}), moa.preset("soft-moa"))
    messages = [str(one.message) for one in caught if "cannot host" in str(one.message)]
    assert len(messages) == 1
    assert (
        "Left out: lora on down in block 1, because the weights of its feed-forward experts are stacked" in messages[0]
    )
    assert (
        "what remains: lora on q, k, v, o, down in block 0; lora on q, k, v, o in block 1; prompt; parallel"
        in messages[0]
    )
    lora = [["q", "k", "v", "o", "down"], ["q", "k", "v", "o"]]
    assert placed(model) == [
        ("lora", lora[0], [0]),
        ("lora", lora[1], [1]),
        ("prompt", None, None),
        ("parallel", None, None),
    ]


@pytest.mark.parametrize("config", [MoAConfig(), moa.preset("soft-moa", targets=["q", "v"])], ids=["bare", "targets"])
def test_a_prompt_that_nobody_asked_for_is_left_out(config: MoAConfig) -> None:
    model = hosting("bloom", config)
    assert [kind for kind, _, _ in placed(model)] == ["lora", "parallel"]
    assert [expert.kind for expert in config.experts] == ["lora", "prompt", "parallel"], (
        "the caller's object is his own"
    )
    assert "prompt" in [kind for kind, _, _ in placed(hosting("llama", config))]


@pytest.mark.parametrize(
    "config",
    [
        moa.preset("soft-moa", targets=["q", "down"]),
        moa.preset("soft-moa", optional=False),
        MoAConfig(experts=[LoraExpert(), ParallelExpert()]),
    ],
    ids=["targets", "not-optional", "experts"],
)
def test_requests_that_do_not_fit_fail(config: MoAConfig) -> None:
    with pytest.raises(ValueError, match=r"lora expert cannot sit at 'down' in block 0 of mixtral.*optional=True"):
        get_peft_model(build_family("mixtral"), config)


SILENT = {
    "one of many": {"gating": TopK(k=1)},
    "softmax over one": {"gating": moa.Softmax(), "experts": [LoraExpert(targets=["o"])]},
    "one sum of one": {"gating": moa.Threshold(renormalise=True), "experts": [ParallelExpert()]},
    "one of many copies": {"router": None, "experts": [LoraExpert(copies=Copies(4, gating=TopK(k=1)))]},
}


@pytest.mark.parametrize("fields", SILENT.values(), ids=SILENT.keys())
def test_a_router_that_would_learn_nothing_is_refused_in_training_alone(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it would learn nothing"):
        get_peft_model(build_family("llama"), MoAConfig(**fields))
    get_peft_model(build_family("llama"), MoAConfig(inference_mode=True, **fields))


HEARD: list[dict[str, Any]] = [
    {"gating": TopK(k=1, balance=0.1)},
    {"gating": moa.Soft(), "experts": [ParallelExpert()]},
    {"gating": moa.Softmax(), "experts": [LoraExpert(targets=["q"]), ParallelExpert(layers=[0])]},
]


@pytest.mark.parametrize("fields", HEARD)
def test_a_router_that_decides_somewhere_learns(fields: dict[str, Any]) -> None:
    model = get_peft_model(build_family("llama"), MoAConfig(init_weights=False, **fields)).train()
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    routers = [p for name, p in model.named_parameters() if ".mixture.moa_w2." in name and p.grad is not None]
    assert max(p.grad.abs().max() for p in routers if p.grad is not None) > 1e-6


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"bloom can host nothing of this configuration\. Left out: the prompt expert"):
        get_peft_model(build_family("bloom"), moa.preset("prompt"))


def test_what_was_placed_is_what_is_saved(tmp_path: Any) -> None:
    model = hosting("jamba", moa.preset("molora"), **DECODERS["jamba"].settings)
    model.save_pretrained(tmp_path)
    saved = MoAConfig.from_pretrained(tmp_path)
    assert [(e.targets, e.layers, e.optional) for e in saved.experts] == [(["q", "k", "v", "o", "down"], [1], False)]
    assert saved.experts[0].copies == Copies(8)


def test_a_default_configuration_stays_one_in_a_file_until_it_is_placed(tmp_path: Any) -> None:
    moa.preset("soft-moa").save_pretrained(tmp_path)
    assert [expert.optional for expert in MoAConfig.from_pretrained(tmp_path).experts] == [True, True, True]


def test_a_shared_gate_is_still_one_after_targets_were_left_out() -> None:
    model = hosting("dots1", moa.preset("unipelt", router={"level": "token"}))
    with moa.gate_values(model) as record:
        model(torch.tensor([[1, 2, 3]]))
    assert record.columns[0] == record.columns[1] == ["lora", "prompt", "parallel"]


GATES = {
    "one kind": ([LoraExpert(["q"], gate="a"), LoraExpert(["v"], gate="b")], ["lora", "lora#2"]),
    "one kind and another": (
        [LoraExpert(["q"], gate="a"), LoraExpert(["v"], gate="b"), ParallelExpert(4, gate="b")],
        ["lora", "lora#2", "parallel"],
    ),
    "a site and a kind": ([ParallelExpert(4, gate="a"), ParallelExpert(4)], ["parallel", "parallel#2"]),
    "a kind and a site": ([ParallelExpert(4), ParallelExpert(4, gate="a")], ["parallel", "parallel#2"]),
}


@pytest.mark.parametrize(("experts", "columns"), GATES.values(), ids=GATES.keys())
def test_a_kind_under_several_gates_has_a_column_for_each(experts: list[Any], columns: list[str]) -> None:
    model = hosting("llama", MoAConfig(experts=copy.deepcopy(experts), init_weights=False))
    with moa.gate_values(model) as record:
        model(torch.tensor([[1, 2, 3]]))
    assert record.columns[0] == columns
    assert record.gates[0].shape[-1] == len(columns)


@pytest.mark.parametrize("name", ["second", "experts"])
def test_a_second_mixture_finds_the_same_places(name: str) -> None:
    model = hosting("recurrent_gemma", **DECODERS["recurrent_gemma"].settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, moa.preset("soft-moa"))
        model.add_adapter("third", moa.preset("soft-moa"))
    assert model.peft_config["third"].experts == model.peft_config["default"].experts


@pytest.mark.parametrize(("given", "blocks"), [(1, [1]), ([0], [0]), ([0, 1], [0, 1])])
def test_layers_to_transform_limits_every_expert(given: Any, blocks: list[int], tmp_path: Any) -> None:
    model = get_peft_model(build_family("llama"), moa.preset("soft-moa", layers_to_transform=given)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with moa.gate_values(model) as record:
        expected = model(tokens).logits
    assert sorted(record.gates) == blocks
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(build_family("llama"), tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize("given", [-1, 0.5, True, "1", []])
def test_layers_to_transform_are_block_numbers(given: Any) -> None:
    with pytest.raises(ValueError, match="layers_to_transform="):
        moa.preset("soft-moa", layers_to_transform=given)


def test_layers_to_transform_are_blocks_of_this_model() -> None:
    with pytest.raises(ValueError, match=r"layers_to_transform=\[2\], but the model has 2 blocks, 0 to 1"):
        get_peft_model(build_family("llama"), moa.preset("soft-moa", layers_to_transform=[0, 2]))
    config = MoAConfig(experts=[LoraExpert(layers=[0])], layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"layers_to_transform=\[1\] has no block in common"):
        get_peft_model(build_family("llama"), config)


def test_more_experts_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match=r"k=4, but block 0 has 3 gates: \['q', 'v', 'parallel'\]"):
        get_peft_model(
            build_family("llama"),
            MoAConfig(experts=[LoraExpert(["q", "v"]), ParallelExpert()], gating=TopK(k=4)),
        )


def test_layers_choose_the_attention_blocks_of_a_hybrid() -> None:
    settings = DECODERS["bamba"].settings
    with pytest.raises(
        ValueError, match=r"prompt expert cannot sit at 'attention' in block 0 of bamba: it has no att.*layers="
    ):
        get_peft_model(build_decoder("bamba", settings), MoAConfig(experts=[PromptExpert()]))
    config = MoAConfig(experts=[PromptExpert(layers=[1])])
    assert placed(get_peft_model(build_decoder("bamba", settings), config)) == [("prompt", None, [1])]


def test_what_is_said_of_a_hybrid_holds_for_the_blocks_that_have_it() -> None:
    said = {"o": "self_attn.o_proj", "attention": "self_attn"}
    model = hosting("bamba", moa.preset("soft-moa", architecture=said), **DECODERS["bamba"].settings)
    assert [layers for kind, _, layers in placed(model) if kind == "prompt"] == [[1]]
    denied = hosting("bamba", moa.preset("soft-moa", architecture={"attention": None}), **DECODERS["bamba"].settings)
    assert "prompt" not in [kind for kind, _, _ in placed(denied)]


def test_compressed_keys_and_values_can_be_adapted_where_no_router_gates_them() -> None:
    model = hosting("minicpm3", moa.preset("lora"), **DECODERS["minicpm3"].settings)
    assert placed(model)[0][1] == ["q", "k", "v", "o", "down"]
    for name, parameter in model.named_parameters():
        if ".moa_B" in name:
            nn.init.normal_(parameter, std=0.3)
    tokens = torch.tensor([[5, 9, 4, 7]])
    with torch.no_grad():
        full = model(tokens).logits
        past = model(tokens[:, :3], use_cache=True).past_key_values
        step = model(tokens[:, 3:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(step[:, 0], full[:, 3], rtol=1e-4, atol=2e-5)


TEXT = {
    key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
}
TEXT |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
TOWER2 = {"depth": 2, "patch_size": 14, "num_heads": 2}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4},
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": "clip_vision_model"},
    },
    "mllama": {
        "text_config": {**TEXT, "cross_attention_layers": [1]},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1}
        | {"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32}
        | {"intermediate_layers_indices": [0]},
    },
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma"},
        "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "projection_dim": 32,
    },
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE},
        "vision_config": TOWER2 | {"embed_dim": 16, "hidden_size": 32},
    },
    "qwen3_vl": {
        "text_config": TEXT,
        "vision_config": TOWER2
        | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "deepstack_visual_indexes": [0]},
    },
}


@pytest.mark.parametrize("family", COMPOSITE)
def test_the_language_model_of_a_composite_one_is_adapted(family: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **COMPOSITE[family])).eval()
    tokens = torch.tensor([[5, 9, 4]])
    expected = base(input_ids=tokens).logits
    if family == "mllama":  # its second block attends to pictures
        with pytest.warns(UserWarning, match="the parallel expert in block 1, because it attends to another model's"):
            model = get_peft_model(base, moa.preset("soft-moa"))
    else:
        model = get_peft_model(base, moa.preset("soft-moa"))
    assert torch.equal(model(input_ids=tokens).logits, expected)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained
    assert all(".language_model.layers." in name for name in trained)
    assert len({name.split(".layers.")[1].split(".")[0] for name in trained}) == (2 if family == "mllama" else 3)


def test_old_files_without_the_new_fields_are_read() -> None:
    fields = moa.preset("soft-moa").to_dict()
    old = copy.deepcopy(
        {key: value for key, value in fields.items() if key not in ("layers_to_transform", "peft_type")}
    )
    for expert in old["experts"]:
        del expert["optional"]
    assert not any(expert.optional for expert in MoAConfig(**old).experts)
