"""A mixture lives the life of any PEFT adapter: saved, reloaded, switched, disabled, removed."""

import copy
import io
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny import (
    adapter_tensors,
    is_adapter,
    logits,
    padded,
    perturb,
    through_transformers,
    tiny_config,
    tiny_llama,
    tiny_moa,
    tiny_tokenizer,
    tokens,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moa
from moa.adapters.presets import PRESETS

NAMES = ["default", "y", "w1", "moa_w1", "moa", "model", "weight"]


def train_a_step(model, **inputs):
    """One step of plain SGD on whatever is trainable."""
    ids = tokens()
    model.train()
    model(input_ids=ids, labels=ids, **inputs).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    model.eval()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_file(name, tmp_path):
    config = moa.preset(name)
    config.save_pretrained(tmp_path / "once")
    loaded = PeftConfig.from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    assert type(loaded) is moa.MoAConfig
    assert loaded == config
    once, twice = ((tmp_path / folder / "adapter_config.json").read_text() for folder in ("once", "twice"))
    assert json.loads(once) == json.loads(twice)
    assert json.loads(once)["peft_type"] == "MOA"


@pytest.mark.parametrize("load", [PeftConfig.from_pretrained, moa.MoAConfig.from_pretrained])
def test_a_file_with_an_unknown_key_is_refused(load, tmp_path):
    moa.preset("soft-moa").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gatting": "soft"}))
    with pytest.raises(ValueError, match=r"gatting.*did you mean 'gating'"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["router", "gating"])
def test_a_file_with_an_unknown_field_inside_is_refused(part, tmp_path):
    moa.preset("soft-moa").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    content[part]["surprise"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{part}.*no field 'surprise'"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_file_from_a_newer_release_is_refused_even_with_keys_of_its_own(tmp_path):
    moa.preset("soft-moa").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99, "hyper": True}))
    with pytest.raises(ValueError, match=r"format 99.*upgrade moa"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_an_unknown_keyword_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"MoAConfig has no field 'expert' \(did you mean 'experts'\?\)"):
        moa.MoAConfig(expert=[moa.LoraExpert()])


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_only_the_mixture_trains():
    model = tiny_moa()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert any("moa_w1" in name for name in trainable)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not is_adapter(name)}
    train_a_step(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_reloads_under_any_name(name, low_cpu_mem_usage, tmp_path):
    model = tiny_moa()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
    first, again = adapter_tensors(model), adapter_tensors(loaded, name)
    assert all(torch.equal(t, again[key.replace(".default.", f".{name}.")]) for key, t in first.items())
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.filterwarnings("ignore:Adapter name 'moa' should not be")
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_saved_under_any_name_reloads_as_the_default(name, tmp_path):
    model = tiny_moa(adapter=name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert not [key for key in load_file(folder / "adapter_model.safetensors") if is_adapter(key, name)]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder)), logits(model))


def test_a_reloaded_adapter_can_go_on_training(tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    before = adapter_tensors(loaded)
    train_a_step(loaded)
    assert not any(torch.equal(before[name], now) for name, now in adapter_tensors(loaded).items())


def test_the_frozen_threshold_stays_frozen_after_every_switch(tmp_path):
    def trainable(model):
        return {name for name, p in model.named_parameters() if p.requires_grad and "moa_threshold" in name}

    model = tiny_moa(tiny_config(gating=moa.Threshold(train_threshold="frozen")))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert {name.rpartition(".")[0][-7:] for name in trainable(loaded)} <= {"default"}
    assert not [name for name in trainable(model) | trainable(loaded) if "copies" not in name]


def test_the_auto_class_finds_base_and_adapter(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny_config()).eval()
    perturb(model).save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_adapters_of_a_bf16_base_are_fp32(tmp_path):
    model = perturb(get_peft_model(tiny_llama().to(torch.bfloat16), tiny_config()).eval())
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().to(torch.bfloat16), tmp_path)
    assert {p.dtype for name, p in loaded.named_parameters() if is_adapter(name)} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_follow_the_dtype_of_the_base_if_asked_to():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), tiny_config(), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(tiny_llama().to(torch.bfloat16)))


def test_modules_to_save_train_and_reload(tmp_path):
    model = tiny_moa(tiny_config(modules_to_save=["lm_head"]))
    head = model.get_output_embeddings().modules_to_save["default"].weight
    before = head.detach().clone()
    train_a_step(model)
    assert not torch.equal(head, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_chosen_rows_of_the_embedding_train_and_reload(tmp_path):
    ids = tokens()
    chosen = sorted({int(ids[0, 0]), int(ids[1, 1])})
    model = tiny_moa(tiny_config(trainable_token_indices=chosen))
    assert torch.equal(logits(model, input_ids=ids), logits(tiny_moa(), input_ids=ids))
    train_a_step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    embedding = loaded.get_input_embeddings()(torch.arange(64))
    moved = (embedding != tiny_llama().get_input_embeddings().weight).any(-1)
    assert moved.nonzero().flatten().tolist() == chosen


def test_the_model_card_says_what_it_is_and_how_to_load_it(tmp_path):
    model = tiny_moa()
    model.save_pretrained(tmp_path)
    file = tmp_path / "README.md"
    assert "More Information Needed" not in file.read_text()
    file.write_text(file.read_text() + "\nTrained on letters.\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(file)
    assert card.data.library_name == "peft"
    assert {"moa", "mixture-of-adapters"} <= set(card.data.tags)
    assert card.text.count("pip install moa-lm") == 1
    assert "- expert `lora`: targets ['q', 'v'], r 2, alpha 8" in card.text
    assert "Trained on letters." in card.text
    tiny_moa(tiny_config(experts=[moa.PromptExpert(length=7)])).save_pretrained(tmp_path)
    card = ModelCard.load(file)
    assert "expert `prompt`: length 7" in card.text
    assert "expert `lora`" not in card.text
    assert "Trained on letters." in card.text


def test_a_card_that_somebody_wrote_is_only_added_to(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [letters]\n---\n# My adapter\n\nOf letters.\n")
    tiny_moa().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.text.startswith("# My adapter\n\nOf letters.")
    assert card.text.count("How to load") == 1


def test_the_snippet_of_the_card_runs(tmp_path, capsys):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, tiny_config()).save_pretrained(tmp_path / "adapter")
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    exec(snippet.replace("path/to/this/adapter", str(tmp_path / "adapter")), {})
    assert len(capsys.readouterr().out) > 20


# --- files that do not fit --------------------------------------------------------------------------------------------


def edited(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"moa_\S+ has shape \(\d+.*32.*\) in the file, \(\d+.*16.*\) in this model"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=16), tmp_path)


@pytest.mark.parametrize("name", ["default", "model"])
def test_a_missing_tensor_is_named(name, tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    gone = "base_model.model.model.layers.1.mixture.moa_w2.weight"
    edited(tmp_path, lambda tensors: tensors.pop(gone))
    with pytest.raises(ValueError, match=r"1 missing, e\.g\. \S+layers\.1\.mixture\.moa_w2"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name)


def test_an_unknown_tensor_is_named(tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    extra = "base_model.model.model.layers.7.mixture.moa_w2.weight"
    edited(tmp_path, lambda tensors: tensors.update({extra: torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"1 unknown, e\.g\. \S+layers\.7\.mixture\.moa_w2"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("first", ["default", "model"])
def test_a_second_adapter_is_checked_on_its_own(first, tmp_path):
    tiny_moa(tiny_config(experts=[moa.LoraExpert(r=3)])).save_pretrained(tmp_path)
    model = tiny_moa(adapter=first)
    model.load_adapter(tmp_path, adapter_name="second")
    model.set_adapter("second")
    expected = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("spoil", ["truncate", "corrupt"])
def test_a_broken_file_is_refused(spoil, tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if spoil == "truncate" else b"\xff" * 16 + content[16:])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|metadata|safetensor"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


# --- several adapters -------------------------------------------------------------------------------------------------

OTHER = {"experts": [moa.LoraExpert(targets=["o", "down"], r=3), moa.ParallelExpert(size=2)], "gating": "soft"}


def two_adapters():
    model = tiny_moa()
    model.add_adapter("second", tiny_config(**OTHER))
    return perturb(model.eval(), 2, "second")


@pytest.mark.parametrize(("first", "second"), [("default", "second"), ("first", "default")])
def test_an_added_adapter_neither_acts_nor_trains_until_it_is_set(first, second):
    model = tiny_moa(adapter=first)
    before = logits(model)
    model.add_adapter(second, tiny_config(**OTHER))
    perturb(model.eval(), 2, second)
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapter_tensors(model, first).keys()
    assert model.get_model_status().active_adapters == [first]


def test_a_second_adapter_trains_while_the_first_keeps_its_values():
    model = two_adapters()
    first, second = adapter_tensors(model), adapter_tensors(model, "second")
    before = logits(model)
    model.set_adapter("second")
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    train_a_step(model)
    assert not any(torch.equal(second[name], now) for name, now in adapter_tensors(model, "second").items())
    assert same(first, adapter_tensors(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    assert all("default" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_second_adapter_is_as_complete_as_an_only_one():
    model = two_adapters()
    model.set_adapter("second")
    alone = tiny_moa(tiny_config(**OTHER))
    names = {name.replace(".second.", ".default.") for name in adapter_tensors(model, "second")}
    assert names == adapter_tensors(alone).keys()
    alone.load_state_dict(
        {name.replace(".second.", ".default."): t for name, t in adapter_tensors(model, "second").items()}, strict=False
    )
    assert torch.equal(logits(model), logits(alone))


def test_two_active_adapters_both_act_and_train():
    model = two_adapters()
    alone = logits(model)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(logits(model), alone, atol=1e-3)
    before = adapter_tensors(model) | adapter_tensors(model, "second")
    train_a_step(model)
    after = adapter_tensors(model) | adapter_tensors(model, "second")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_deleted_adapter_leaves_nothing():
    model = two_adapters()
    before = logits(model)
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]
    layers = [vars(module) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    dicts = [(name, value) for layer in layers for name, value in layer.items() if isinstance(value, dict)]
    assert not [name for name, value in dicts if "second" in value]
    assert torch.equal(logits(model), before)


@pytest.mark.skipif(not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="this PEFT saves without asking")
@pytest.mark.parametrize("name", ["0", "mlp", "mixture", "moa_A"])
def test_nothing_is_lost_beside_an_adapter_that_is_called_what_a_module_is(name, tmp_path):
    """PEFT tells tensors of other adapters by their names."""
    model = tiny_moa()
    model.save_pretrained(tmp_path / "alone")
    model.add_adapter(name, tiny_config())
    with pytest.raises(ValueError, match=f"'default' cannot be saved beside one that is called '{name}'"):
        model.save_pretrained(tmp_path / "beside", selected_adapters=["default"])
    model.save_pretrained(tmp_path / "beside", selected_adapters=[name])
    model.delete_adapter(name)
    model.save_pretrained(tmp_path / "after")
    alone, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("alone", "after"))
    assert same(alone, after)


def test_after_deleting_the_first_adapter_the_second_acts():
    model = two_adapters()
    model.set_adapter("second")
    before = logits(model)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model), before)


RESCALED = [moa.LoraExpert(["k", "v", "down"], r=2), moa.Ia3Expert()]


@pytest.mark.parametrize(
    ("before", "experts"),
    [
        ([moa.Ia3Expert()], RESCALED),
        ([moa.Ia3Expert(["v"]), moa.LoraExpert(["q"], r=2)], RESCALED),
        ([moa.AdapterExpert(4)], [moa.PromptExpert(3), moa.AdapterExpert(4), moa.LoraExpert(["o"], r=2)]),
    ],
)
def test_an_adapter_is_what_it_is_alone_whatever_came_before_it(before, experts):
    model = tiny_moa(tiny_config(experts=before))
    model.add_adapter("second", tiny_config(experts=experts))
    perturb(model.eval(), 2, "second").set_adapter("second")
    alone = perturb(tiny_moa(tiny_config(experts=experts), adapter="second"), 2, "second")
    assert torch.equal(logits(model), logits(alone))


def test_an_adapter_that_is_added_while_others_are_switched_off_is_off_too():
    model = tiny_moa(tiny_config(experts=[moa.LoraExpert(["q"], r=2)]))
    with model.disable_adapter():
        model.add_adapter("second", tiny_config())
        perturb(model.eval(), 2, "second").base_model.set_adapter("second")
        assert torch.equal(logits(model), logits(tiny_llama()))
        assert model.get_model_status().enabled is False
    alone = perturb(tiny_moa(adapter="second"), 2, "second")
    assert torch.equal(logits(model), logits(alone))


@pytest.mark.parametrize(
    ("saved", "config"),
    [
        (["q_proj"], {}),
        (["mlp"], {}),
        (["layers.1"], {}),
        (["lm_head", "self_attn"], {"experts": [moa.ParallelExpert(4)], "router": moa.Router(input="attention")}),
    ],
)
def test_modules_that_are_part_of_a_mixture_are_not_saved_beside_it(saved, config):
    base = tiny_llama()
    before = anatomy(base)
    with pytest.raises(ValueError, match=r"modules_to_save=.*layers\.\d\S* has experts or is read by a router"):
        get_peft_model(base, tiny_config(modules_to_save=saved, **config))
    assert anatomy(base) == before
    with pytest.raises(ValueError, match=r"modules_to_save=\['lmhead'\]: no module's path ends with"):
        get_peft_model(base, tiny_config(modules_to_save=["lmhead"]))
    model = tiny_moa()
    expected = logits(model)
    with pytest.raises(ValueError, match="has experts or is read by a router"):
        model.add_adapter("second", tiny_config(experts=[moa.LoraExpert(["o"], r=2)], modules_to_save=["q_proj"]))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["a.b", "__base__"])
def test_a_name_that_no_adapter_can_have_is_refused(name):
    model = tiny_moa()
    before, expected = anatomy(model), logits(model)
    with pytest.raises(ValueError, match=re.escape(f"adapter_name={name!r} must be a word without dots")):
        model.add_adapter(name, tiny_config(**OTHER))
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)


def test_gates_of_an_adapter_that_is_not_there_are_refused():
    message = r"gate_values: there is no adapter 'second'; there are \['default'\]"
    with pytest.raises(ValueError, match=message), moa.gate_values(tiny_moa(), "second"):
        pass


def test_mixed_peft_models_are_refused():
    with pytest.raises(ValueError, match="MOA"):
        get_peft_model(tiny_llama(), tiny_config(), mixed=True)


# --- switching off and taking off -------------------------------------------------------------------------------------


def test_a_disabled_adapter_is_the_base_bit_for_bit_also_nested():
    model, base = tiny_moa(), logits(tiny_llama())
    acting = logits(model)
    assert not torch.allclose(acting, base, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), acting)
    assert all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())


def anatomy(model):
    """What a mixture could leave behind on a model: classes, hooks, children, configurations, instance attributes."""
    return {
        name: (
            type(module),
            [*module._forward_hooks.values(), *module._forward_pre_hooks.values()],
            list(module._modules),
            id(getattr(module, "config", None)),
            sorted(key for key in vars(module) if not key.startswith("_")),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("adapters", [1, 2])
def test_unloading_restores_the_base_completely(adapters):
    base = tiny_llama()
    before, tensors = anatomy(base), {name: t.clone() for name, t in base.state_dict().items()}
    model = perturb(get_peft_model(base, tiny_config()))
    if adapters == 2:
        model.add_adapter("second", tiny_config(**OTHER))
    assert anatomy(base) != before
    unloaded = model.unload()
    assert unloaded is base
    assert anatomy(base) == before
    assert same(base.state_dict(), tensors)
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_blocks_without_experts_are_of_the_same_class_as_the_others():
    """FSDP's wrap policies take the class of the first block that has the right name."""
    model = tiny_moa(tiny_config(experts=[moa.LoraExpert(layers=[1])]))
    classes = {type(block) for block in model.model.model.layers}
    assert [cls.__name__ for cls in classes] == ["LlamaDecoderLayer"]
    assert isinstance(model.model.model.layers[0], type(tiny_llama().model.layers[0]))
    assert not torch.allclose(logits(model), logits(tiny_llama()), atol=1e-3)


def test_an_unloaded_base_takes_a_mixture_again():
    expected = logits(tiny_moa())
    again = perturb(get_peft_model(tiny_moa().unload(), tiny_config()).eval())
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_with_a_reason(method):
    model = tiny_moa()
    with pytest.raises(NotImplementedError, match=r"gates differ from token to token.*unload\(\)"):
        getattr(model, method)()
    assert not torch.equal(logits(model), logits(tiny_llama()))


# --- other entrances --------------------------------------------------------------------------------------------------


def test_the_status_is_regular():
    model = tiny_moa()
    status = model.get_model_status()
    assert status.adapter_model_type == "MoAModel"
    assert status.peft_types == {"default": "MOA"}
    assert status.enabled is True
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for n, p in model.named_parameters() if is_adapter(n))
    names = {layer.name for layer in model.get_layer_status()}
    assert {"model.model.layers.0.mixture", "model.model.layers.1.self_attn.q_proj.mixture_q"} <= names
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_injection_into_a_bare_model():
    model = inject_adapter_in_model(tiny_config(), tiny_llama())
    assert type(model) is type(tiny_llama())
    trained = tiny_moa()
    state = get_peft_model_state_dict(trained)
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    assert torch.equal(logits(model), logits(trained))
    back = get_peft_model_state_dict(model)
    assert same({f"base_model.model.{name}": t for name, t in back.items()}, state)


def test_set_peft_model_state_dict_checks_the_tensors():
    state = get_peft_model_state_dict(tiny_moa())
    state.pop("base_model.model.model.layers.0.mixture.moa_w2.weight")
    with pytest.raises(ValueError, match="1 missing"):
        set_peft_model_state_dict(tiny_moa(), state)


@through_transformers
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("name", ["default", "second"])
def test_the_adapter_methods_of_transformers(name, tmp_path):
    base, expected = logits(tiny_llama()), logits(tiny_moa())
    model = tiny_llama()
    model.add_adapter(tiny_config(), adapter_name=name)
    perturb(model, adapter=name)
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.add_adapter(tiny_config(**OTHER), adapter_name="other")
    model.set_adapter(name)
    assert torch.equal(logits(model), expected)
    model.delete_adapter("other")
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path), adapter_name="elsewhere")
    torch.testing.assert_close(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
    model.delete_adapter(name)
    assert torch.equal(logits(model), base)


def test_load_adapter_of_transformers_refuses_another_base(tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        tiny_llama(hidden_size=16).load_adapter(str(tmp_path))


def test_a_deep_copy_is_independent():
    model = tiny_moa()
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    perturb(twin, seed=3)
    assert not torch.allclose(logits(twin), before, atol=1e-3)
    assert torch.equal(logits(model), before)
    train_a_step(twin)
    assert all(p.grad is None for p in model.parameters())
    twin.unload()
    assert torch.equal(logits(model), before)


def test_a_whole_model_survives_pickling():
    model = tiny_moa()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded.unload()), logits(tiny_llama()))


# --- the base model's configuration -----------------------------------------------------------------------------------


def test_switching_the_attention_implementation_keeps_the_prompt_expert():
    text = padded()["attention_mask"].bool()
    model = tiny_moa(tiny_config(experts=[moa.PromptExpert(length=3)]))
    before = logits(model)[text]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model)[text], before)
    assert not torch.allclose(before, logits(tiny_llama())[text], atol=1e-2)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model)[text], before)


def test_the_shared_configuration_is_left_alone():
    base = tiny_llama()
    before = base.config.to_dict()
    model = get_peft_model(base, tiny_config())
    other = type(base)(base.config).eval()
    other.load_state_dict(tiny_llama().state_dict())
    assert model.config is base.config is other.config
    assert base.config.to_dict() == before
    assert base.config._attn_implementation == "sdpa"
    assert torch.equal(logits(other), logits(tiny_llama()))
    assert model.model.model.layers[0].self_attn.config is not base.config
    assert model.model.model.layers[0].self_attn.config.to_dict() == before


# --- generating -------------------------------------------------------------------------------------------------------

ROUTERS = {
    "token": moa.Router(),
    "instance": moa.Router(level="instance"),
    "attention input": moa.Router(level="instance", input="attention"),
}


def generated(model, ids, **options):
    return model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_every_way_to_generate_gives_the_same_tokens(router):
    model, ids = tiny_moa(tiny_config(router=router)), tokens()
    expected = generated(model, ids, use_cache=False)
    assert not torch.equal(expected, generated(tiny_llama(), ids))
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, cache_implementation="static"), expected)
    rows = [generated(model, ids[row : row + 1, 2 * row :]) for row in range(2)]
    left, mask = ids.clone(), torch.ones_like(ids)
    left[1, :2], mask[1, :2] = 0, 0
    both = generated(model, left, attention_mask=mask)
    assert torch.equal(both[0], rows[0][0])
    assert torch.equal(both[1, 2:], rows[1][0])


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_beams_move_with_the_cache(router):
    model, ids = tiny_moa(tiny_config(router=router)), tokens()
    beams = generated(model, ids, num_beams=3, use_cache=False)
    assert not torch.equal(beams, generated(model, ids))
    assert torch.equal(generated(model, ids, num_beams=3), beams)


# --- the plain Trainer ------------------------------------------------------------------------------------------------


def trainer(folder, steps, **arguments):
    model = perturb(get_peft_model(tiny_llama(), tiny_config()))
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 6)]
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True}
    settings |= {"save_steps": 2, "logging_steps": 1, "gradient_checkpointing": True, "use_cpu": True}
    options = TrainingArguments(str(folder), max_steps=steps, lr_scheduler_type="constant", **settings, **arguments)
    return Trainer(model, options, train_dataset=rows)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    trainer(tmp_path / "parts", 2).train()
    resumed = trainer(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert same(adapter_tensors(whole.model), adapter_tensors(resumed.model))
    start = adapter_tensors(trainer(tmp_path / "start", 1).model)
    assert not any(torch.equal(start[name], now) for name, now in adapter_tensors(resumed.model).items())
