"""Adapters on bases of every quantiser that runs on a CPU, beside PEFT's LoRA: train, save, load, decode.

The table needs an environment with all of them, `make quantised`; what it taught is tested here without any.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import gradients, logits, perturb, seeded, tiny_config, tiny_llama, tiny_moa, tokens
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import moa

# --- without quantisers -----------------------------------------------------------------------------------------------


class Packed(nn.Linear):
    """As bitsandbytes' 4-bit layers after inference on a CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=False)


class Cut(nn.Linear):
    """A layer for inference alone."""

    def forward(self, x):
        return super().forward(x).detach()


class Closed(nn.Linear):
    """A layer that writes its own state dict, as HQQ's do."""

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        destination[f"{prefix}weight"] = self.weight
        return destination


def with_layers(cls, *names):
    model = tiny_llama()
    for block in model.model.layers:
        for name in names:
            parent, _, child = name.rpartition(".")
            old = block.get_submodule(name)
            new = cls(old.in_features, old.out_features, bias=False)
            new.load_state_dict(nn.Module.state_dict(old))
            setattr(block.get_submodule(parent), child, new.requires_grad_(False))
    return model.eval()


EXPERTS = {
    "q": ("self_attn.q_proj", [moa.LoraExpert(["q"])]),
    "down": ("mlp.down_proj", [moa.LoraExpert(["v", "down"])]),
    "parallel": ("mlp.down_proj", [moa.ParallelExpert()]),
    "prompt": ("self_attn.q_proj", [moa.PromptExpert(), moa.LoraExpert(["o"])]),
}


@pytest.mark.parametrize("site", EXPERTS)
def test_training_past_a_layer_without_gradient_is_refused(site):
    name, experts = EXPERTS[site]
    model = perturb(get_peft_model(with_layers(Cut, name), moa.MoAConfig(experts=experts)))
    with pytest.raises(ValueError, match=rf"no gradient passes through the base's layer at '{site}'.*inference"):
        model.train()(input_ids=tokens(), labels=tokens())
    assert logits(model.eval()).isfinite().all()
    assert model(input_ids=tokens()).logits.isfinite().all()  # evaluation with gradients switched on


def test_training_on_packed_weights_is_refused():
    base = with_layers(Packed, "mlp.up_proj")
    model = perturb(get_peft_model(base, tiny_config())).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    base.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"4-bit weights of block 1.*Load the base again"):
        model(input_ids=tokens(), labels=tokens())
    assert logits(model.eval()).isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_is_not_taken_for_it(reentrant):
    model = tiny_moa().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert gradients(model)


def test_experts_in_layers_with_a_state_dict_of_their_own_are_saved(tmp_path):
    names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    model = perturb(get_peft_model(with_layers(Closed, *names), tiny_config()).eval())
    assert {name for name, _ in model.named_parameters()} <= model.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(with_layers(Closed, *names), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(tiny_moa()))
    base = loaded.unload()
    assert base.state_dict().keys() == tiny_llama().state_dict().keys()


# --- the table --------------------------------------------------------------------------------------------------------

table = [
    pytest.mark.slow,
    pytest.mark.skipif("MOA_QUANTISED" not in os.environ, reason="needs all quantisers: make quantised"),
    pytest.mark.filterwarnings("default"),
]


def every(test):
    """All marks of the table on one test."""
    for mark in table:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """The base as files, which every quantiser loads anew."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with seeded(0):
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special)).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def read(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)


def bitsandbytes(**settings):
    return lambda folder: read(folder, quantization_config=BitsAndBytesConfig(**settings))


def torchao(name):
    def load(folder):
        import torchao.quantization
        from transformers import TorchAoConfig

        return read(folder, quantization_config=TorchAoConfig(getattr(torchao.quantization, name)()))

    return load


def quanto(weights):
    def load(folder):
        import optimum.quanto

        model = read(folder)
        optimum.quanto.quantize(model, weights=getattr(optimum.quanto, weights), exclude="lm_head")
        optimum.quanto.freeze(model)
        return model

    return load


def hqq(folder):
    """By HQQ's own door, since transformers' is closed."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, settings = read(folder), BaseQuantizeConfig(nbits=4, group_size=64)
    for parent in [part for block in model.model.layers for part in (block.self_attn, block.mlp)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, HQQLinear(child, settings, compute_dtype=torch.float32, device="cpu"))
    return model


def gptq(folder):
    """Quantised once, on a few lines of text, and then read back."""
    from transformers import GPTQConfig

    done = folder / "gptq"
    if not done.exists():
        text = ["the quick brown fox jumps over the lazy dog " * 10] * 8
        config = GPTQConfig(bits=4, group_size=64, dataset=text, tokenizer=AutoTokenizer.from_pretrained(folder))
        read(folder, quantization_config=config).save_pretrained(done)
    return read(done)


def gguf(folder):
    from test_models import write_gguf

    file = folder / "base.Q8_0.gguf"
    if not file.exists():
        write_gguf(file, read(folder), AutoTokenizer.from_pretrained(folder), "Q8_0")
    return read(folder, gguf_file=file.name)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
QUANTISERS = {
    "bitsandbytes nf4": bitsandbytes(**NF4),
    "bitsandbytes nf4, double": bitsandbytes(**NF4, bnb_4bit_use_double_quant=True),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
    "HQQ 4 bits": hqq,
    "GPTQ 4 bits": gptq,
    "GGUF Q8_0": gguf,
}
ADAPTERS = {
    "soft-moa": lambda: moa.preset("soft-moa", r=4),
    "sparse-moa": lambda: moa.preset("sparse-moa", r=4),
    "LoRA": lambda: LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
}
IDS = torch.randint(3, 260, (4, 24), generator=torch.Generator().manual_seed(0))


def adapted(base, adapter, noise=0.1):
    model = get_peft_model(base, ADAPTERS[adapter]())
    with seeded(0), torch.no_grad():  # by name, since quantisers change the order of modules
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * noise)
    return model.train()


def unpacked(quantised, folder):
    """A plain model with the matrices that the quantised one computes with."""
    model, layers = read(folder), dict(quantised.train().named_modules())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(layers[name](torch.eye(layer.in_features)).T)
            elif hasattr(layer, "weight"):
                layer.weight.copy_(layers[name].weight)
    return model


def steps(model, number=8):
    """Losses of so many steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(number):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_gradients_are_those_on_the_unpacked_weights(folder, quantiser, adapter):
    load = QUANTISERS[quantiser]
    model = adapted(load(folder), adapter)
    plain = adapted(unpacked(load(folder), folder), adapter)
    for one in (model, plain):
        one(input_ids=IDS, labels=IDS).loss.backward()
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@every
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_it_trains_saves_loads_and_decodes(folder, tmp_path, quantiser, adapter):
    model = adapted(QUANTISERS[quantiser](folder), adapter)
    losses = steps(model)
    assert losses[-1] < losses[0] - 1
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(QUANTISERS[quantiser](folder), tmp_path)
    whole = logits(loaded, input_ids=IDS)
    saved = {name: p for name, p in model.named_parameters() if ".default." in name}
    assert all(torch.equal(p, saved[name]) for name, p in loaded.named_parameters() if name in saved)
    # GPTQ computes in bfloat16 where it has not been trained
    assert (whole - logits(model, input_ids=IDS)).abs().max() <= 0.02 * whole.abs().max() * (quantiser == "GPTQ 4 bits")
    with torch.no_grad():
        first = loaded(input_ids=IDS[:, :20])
        later = [
            loaded(input_ids=token, past_key_values=first.past_key_values) for token in IDS[:, 20:].split(1, dim=1)
        ]
    cached = torch.cat([out.logits for out in (first, *later)], dim=1)
    assert (cached - whole).abs().max() < 0.05 * whole.abs().max()
    assert loaded.generate(input_ids=IDS[:2, :6], max_new_tokens=8, min_new_tokens=8, do_sample=False).shape == (2, 14)


def bitsandbytes_packs() -> bool:
    """Whether its 4-bit layers repack their weights for inference on this processor."""
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


@every
@pytest.mark.parametrize("adapter", ["soft-moa", "sparse-moa"])
@pytest.mark.parametrize("quantiser", ["bitsandbytes nf4", "GPTQ 4 bits"])
def test_a_base_that_was_evaluated_before_is_not_trained_on(folder, quantiser, adapter):
    model = get_peft_model(QUANTISERS[quantiser](folder), ADAPTERS[adapter]())
    logits(model.eval(), input_ids=IDS)
    if quantiser == "bitsandbytes nf4" and not bitsandbytes_packs():
        losses = steps(model.train())
        assert losses[-1] < losses[0] - 1
        return
    with pytest.raises(ValueError, match=r"no gradient passes.*oad the base again,? and train it before"):
        steps(model.train())


@every
@pytest.mark.parametrize("adapter", ["soft-moa", "sparse-moa"])
def test_dynamic_int8_is_for_inference(folder, tmp_path, adapter):
    load = torchao("Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ValueError, match=r"no gradient passes through the base's layer at 'o'.*dynamic int8"):
        steps(adapted(load(folder), adapter))
    trained = adapted(QUANTISERS["torchao int8"](folder), adapter)
    steps(trained)
    trained.eval().save_pretrained(tmp_path)
    found = logits(PeftModel.from_pretrained(load(folder), tmp_path), input_ids=IDS)
    expected = logits(trained, input_ids=IDS)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@every
def test_what_does_not_run_here_says_why(folder):
    """When one of these starts to run, it belongs into the table."""
    from transformers import HqqConfig

    with pytest.raises(NotImplementedError, match="HQQ"):
        read(folder, quantization_config=HqqConfig(nbits=4, group_size=64))
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        torchao("Int4WeightOnlyConfig")(folder)
