"""One batch, several adapters: every row is what it would be alone with its own adapter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from families import DECODERS, FAMILIES, build_decoder, build_family
from peft import get_peft_model
from tiny import adapter_tensors, gradients, logits, padded, perturb, tiny_config, tiny_llama, tokens

import moa

BASE = "__base__"
CONFIGS = {
    "all kinds": {},
    "instance": {"router": moa.Router(level="instance", input="attention"), "gating": "soft"},
    "instance at the block": {"router": moa.Router(level="instance"), "gating": "soft"},
    "reference-instance": {"router": moa.Router(level="reference-instance"), "gating": "soft"},
    "ungated": {
        "router": None,
        "experts": [moa.LoraExpert(r=3), moa.ParallelExpert(size=2), moa.PromptExpert(length=2)],
    },
    "ia3": {"experts": [moa.Ia3Expert(), moa.LoraExpert(["q", "o"], r=2)], "gating": "soft"},
    "one block": {"experts": [moa.LoraExpert(["q", "down"], r=2, layers=[1])], "gating": "soft"},
    "behind attention": {
        "experts": [moa.AdapterExpert(size=3), moa.PromptExpert(length=2, copies=2)],
        "gating": "soft",
    },
}
OTHER = {"experts": [moa.LoraExpert(["o"], r=3)], "gating": "soft"}
NAMES = ["default", "second", BASE, "default", "second"]


def two(first="all kinds", second="instance", base=None, **settings):
    model = get_peft_model(base or tiny_llama(), tiny_config(**CONFIGS[first], **settings))
    model.add_adapter("second", tiny_config(**CONFIGS[second], **settings))
    perturb(model.eval())
    return perturb(model, 2, "second")


def alone(model, name):
    """The model as one adapter leaves it, or as the base."""
    if name == BASE:
        return model.disable_adapter()
    model.set_adapter(name)
    return nullcontext()


def row(batch, number):
    return {name: tensor[number : number + 1] for name, tensor in batch.items()}


def one_by_one(model, names, batch, run):
    results = []
    for number, name in enumerate(names):
        with alone(model, name):
            results.append(run(row(batch, number)))
    model.set_adapter("default")
    return results


@pytest.mark.parametrize("length", [3, 16], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("second", CONFIGS)
def test_every_row_is_what_it_is_alone(second, length):
    model = two(second=second)
    batch = {"input_ids": tokens(5, length)} if length == 3 else padded(5, length)
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: logits(model, **one)))
    found = logits(model, **batch, adapter_names=NAMES)
    shown = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert (found - expected)[shown].abs().max() < 1e-4
    default = logits(model, **batch)
    assert (default - expected)[1].abs().max() > 1e-2
    assert torch.equal(logits(model, **batch), default)


@pytest.mark.parametrize(("first", "second"), [("all kinds", "instance"), ("reference-instance", "ungated")])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_every_row_the_tokens_it_gets_alone(first, second, beams):
    model = two(first, second)
    batch = {"input_ids": tokens(5, 6)}
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
    settings["num_return_sequences"] = min(beams, 2)
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: model.generate(**one, **settings)))
    found = model.generate(**batch, **settings, adapter_names=NAMES)
    assert torch.equal(found, expected)
    assert not torch.equal(model.generate(**batch, **settings), expected)


def test_a_padded_batch_generates_what_its_rows_do():
    model = two("instance at the block", "all kinds")
    batch, settings = padded(5, 12), {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: model.generate(**one, **settings)))
    assert torch.equal(model.generate(**batch, **settings, adapter_names=NAMES), expected)


@pytest.mark.filterwarnings("ignore:(mixtral|mpt) cannot host")
@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "qwen3", "mixtral", "gpt_neox", "mpt", "gemma3n_text"])
def test_in_other_families(family):
    """PEFT hands MPT's names on without reading them; Gemma 3n's blocks read all rows in several streams."""
    decoder = DECODERS[family]
    base = build_family(family) if family in FAMILIES else build_decoder(family, decoder.settings)
    model = get_peft_model(base, moa.preset("soft-moa", r=2, **decoder.overrides))
    model.add_adapter("second", moa.preset("sparse-moa", r=3))
    perturb(model.eval())
    perturb(model, 2, "second")
    batch = {"input_ids": tokens(5, 9)}
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: logits(model, **one)))
    scale = expected.abs().max()
    assert (logits(model, **batch, adapter_names=NAMES) - expected).abs().max() < 1e-4 * scale


def test_a_flat_feed_forward_input():
    """Some families hand their MLP (batch * tokens, features)."""
    model = two("all kinds", "ungated")
    for block in model.get_base_model().model.layers:
        mlp = block.mlp
        forward = mlp.forward
        mlp.forward = lambda x, forward=forward: forward(x.flatten(0, 1)).view(x.shape)
    batch = {"input_ids": tokens(5, 16)}
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: logits(model, **one)))
    assert (logits(model, **batch, adapter_names=NAMES) - expected).abs().max() < 1e-4


def test_bfloat16():
    model = two(second="ia3", base=tiny_llama().bfloat16())
    batch = {"input_ids": tokens(5, 16)}
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: logits(model, **one)))
    assert (logits(model, **batch, adapter_names=NAMES) - expected).abs().max() < 0.03 * expected.abs().max()


def test_adapters_that_are_not_active_are_used_and_an_active_one_is_not():
    model = two()
    model.set_adapter("second")
    expected = logits(two(), input_ids=tokens())
    assert (logits(model, input_ids=tokens(), adapter_names=["default"] * 2) - expected).abs().max() < 1e-5
    assert torch.equal(
        logits(model, input_ids=tokens(), adapter_names=[BASE] * 2), logits(tiny_llama(), input_ids=tokens())
    )


def test_a_disabled_adapter_stays_disabled():
    model = two()
    with model.disable_adapter():
        found = logits(model, input_ids=tokens(), adapter_names=["default", "second"])
    assert torch.equal(found, logits(tiny_llama(), input_ids=tokens()))


def test_gradients_in_evaluation_mode():
    model, batch = two("all kinds", "ungated"), {"input_ids": tokens(2, 16)}
    for parameter_of in ("default", "second"):
        for name, parameter in model.named_parameters():
            if f".{parameter_of}." in name:
                parameter.requires_grad_(True)
    model(**batch, adapter_names=["default", "second"]).logits.square().mean().backward()
    found = gradients(model)
    assert found.keys() == {*adapter_tensors(model), *adapter_tensors(model, "second")}
    for number, name in enumerate(["default", "second"]):
        model.zero_grad()
        with alone(model, name):
            (model(**row(batch, number)).logits.square().mean() / 2).backward()
        for parameter, gradient in gradients(model).items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", [None, ["lm_head"]])
@pytest.mark.parametrize("saved", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 8, 9]}], ids=str)
def test_what_is_saved_beside_an_adapter(first, saved):
    model = get_peft_model(tiny_llama(), tiny_config(modules_to_save=first)).eval()
    model.add_adapter("second", tiny_config(**OTHER, **saved))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name or "trainable_tokens_delta.second" in name:
                parameter.mul_(-0.5)
    batch = {"input_ids": torch.cat([tokens(5), torch.tensor([[7, 8, 9]] * 5)], dim=1)}
    expected = torch.cat(one_by_one(model, NAMES, batch, lambda one: logits(model, **one)))
    assert (logits(model, **batch, adapter_names=NAMES) - expected).abs().max() < 1e-4
    assert (expected[1] - logits(tiny_llama(), **batch)[1]).abs().max() > 1e-2


@pytest.mark.parametrize("saved", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 8, 9]}], ids=str)
def test_threads_have_rows_of_their_own(saved):
    model = get_peft_model(tiny_llama(), tiny_config(**saved)).eval()
    model.add_adapter("second", tiny_config(**OTHER, **saved))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name or "trainable_tokens_delta.second" in name:
                parameter.mul_(-0.5)
    batch = {"input_ids": torch.tensor([[7, 8, 9]] * 2)}
    expected, given = logits(model, **batch), {}

    def between(*_):
        """Runs on the model in another thread while this one is in the middle of a forward."""
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            given["active"] = pool.submit(lambda: logits(model, **batch)).result()
            names = {"adapter_names": ["second", BASE]}
            given["named"] = pool.submit(lambda: logits(model, **batch, **names)).result()

    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(between)
    found = logits(model, **batch, adapter_names=[BASE, "second"])
    assert torch.equal(given["active"], expected)
    assert torch.equal(given["named"].flip(0), found)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_what_cannot_work_is_refused():
    model = two()
    with pytest.raises(ValueError, match=r"no adapter 'thrid'; there are \['default', 'second', '__base__'\]"):
        model(input_ids=tokens(), adapter_names=["default", "thrid"])
    with pytest.raises(TypeError, match="must be a list"):
        model(input_ids=tokens(), adapter_names="default")
    for rows in (1, 4):
        with pytest.raises(ValueError, match=f"2 entries and the batch {rows} rows"):
            model(input_ids=tokens(rows), adapter_names=["default", "second"])
        with pytest.raises(ValueError, match=f"2 entries and the batch {rows} rows"):
            model.generate(input_ids=tokens(rows), adapter_names=["default", "second"], max_new_tokens=2)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=tokens(), adapter_names=["default", "second"])


def test_an_error_inside_leaves_nothing_behind():
    model = two()
    expected = logits(model)
    with pytest.raises(ValueError, match="rows"):
        model(input_ids=tokens(3), adapter_names=["default", "second"])
    assert torch.equal(logits(model), expected)
