"""Gates belong to one forward of one block in one thread, whatever runs the block: checkpointing, compilers, hooks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import build_family
from peft import PeftModel, get_peft_model
from tiny import (
    adapter_tensors,
    gradients,
    is_adapter,
    logits,
    padded,
    perturb,
    tiny_config,
    tiny_llama,
    tiny_moa,
    tokens,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import StaticCache

import moa
from moa.adapters.block import Mixture

CHECKPOINTING = {"reentrant": True, "not reentrant": False}
BALANCED = moa.Threshold(balance=0.5, z_loss=0.1)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def prepared(model, reentrant=None):
    model.train()
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def contexts(model):
    return [module.context for module in model.modules() if isinstance(module, Mixture)]


def assert_same_gradients(model, expected, **tolerance):
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert {name for name in found if is_adapter(name)} == adapter_tensors(model).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("level", ["token", "instance"])
def test_checkpointed_gradients_are_the_plain_ones(reentrant, forwards, level):
    def backward(model):
        sum([(i + 1) * loss_of(model, tokens(seed=i)) for i in range(forwards)]).backward()
        return model

    config = tiny_config(router=moa.Router(level=level), gating=BALANCED)
    expected = gradients(backward(prepared(tiny_moa(config))))
    assert_same_gradients(backward(prepared(tiny_moa(config), reentrant)), expected)


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_the_auxiliary_gradient_survives_checkpointing(reentrant):
    def router_gradient(gating, reentrant=None):
        model = prepared(tiny_moa(tiny_config(gating=gating)), reentrant)
        loss = loss_of(model, tokens())
        loss.backward()
        return loss.detach(), model.get_submodule("base_model.model.model.layers.0.mixture.moa_w2.default").weight.grad

    plain_loss, plain = router_gradient(moa.Threshold())
    loss, balanced = router_gradient(BALANCED)
    assert torch.equal(loss, plain_loss)
    assert not torch.allclose(balanced, plain, atol=1e-3)
    torch.testing.assert_close(router_gradient(BALANCED, reentrant)[1], balanced)


BALANCED_COPIES = moa.LoraExpert(targets=["down"], copies=moa.Copies(3, gating=moa.Softmax(balance=0.5, z_loss=0.1)))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"gating": BALANCED}, id="router"),
        pytest.param({"gating": BALANCED, "router": moa.Router(input="attention")}, id="router before attention"),
        pytest.param({"experts": [BALANCED_COPIES], "gating": "soft"}, id="copies"),
        pytest.param({"experts": [BALANCED_COPIES], "router": None}, id="copies alone"),
    ],
)
def test_padding_takes_no_part_in_the_auxiliary_loss(config):
    text = tokens(1, 6)
    alone = prepared(tiny_moa(tiny_config(**config)))
    alone(input_ids=text, labels=text).loss.backward()

    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    labels = ids.where(places > 0, -100)  # nor is the first letter to be predicted from padding
    model = prepared(tiny_moa(tiny_config(**config)))
    model(input_ids=ids, attention_mask=mask, position_ids=places, labels=labels).loss.backward()
    assert_same_gradients(model, gradients(alone), rtol=1e-3, atol=1e-4)


def test_wrapping_blocks_for_checkpointing_as_fsdp_does():
    model = prepared(tiny_moa())
    loss_of(model, tokens()).backward()
    wrapped = prepared(tiny_moa())
    blocks = wrapped.get_base_model().model.layers
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    loss_of(wrapped, tokens()).backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(wrapped).items()}
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_recomputation_is_not_recorded():
    model = prepared(tiny_moa(), reentrant=False)
    with moa.gate_values(model) as record:
        loss_of(model, tokens()).backward()
    assert record.gates[0].shape[:2] == (2, 8)


# --- the context ------------------------------------------------------------------------------------------------------


def test_threads_share_a_model_but_no_gates():
    model = tiny_moa()
    batches = [tokens(rows, length, seed=rows) for rows, length in ((1, 5), (2, 9))]
    expected = [logits(model, input_ids=batch) for batch in batches]
    together = threading.Barrier(2, timeout=30)

    def meet(*_):
        together.wait()

    model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(meet)  # both are past their routers here

    def serve(which):
        return [logits(model, input_ids=batches[which]) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(serve, (0, 1)))
    for outputs, right in zip(results, expected, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, right)


def assert_clean(model):
    for context in contexts(model):
        assert context.forward is None


@pytest.mark.parametrize("path", ["self_attn", "self_attn.o_proj", "mlp.act_fn"])
def test_nothing_is_left_after_a_forward_or_an_exception_in_a_block(path):
    model = tiny_moa()
    before = logits(model)
    assert_clean(model)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[1].get_submodule(path).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    assert_clean(model)
    handle.remove()
    assert torch.equal(logits(model), before)


def test_an_exception_while_prompt_keys_are_computed_leaves_nothing():
    model = tiny_moa()
    before = logits(model)
    calls = []

    def fail_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[0].self_attn.k_proj.register_forward_hook(fail_second)
    with pytest.raises(KeyboardInterrupt):
        model(**padded())  # with gradients: without, the prompt's keys may be kept from before
    assert len(calls) == 2  # the block's own keys, then the prompt's
    handle.remove()
    assert_clean(model)
    assert torch.equal(logits(model), before)


def test_an_expert_outside_of_its_block_says_so():
    model = tiny_moa()
    with pytest.raises(RuntimeError, match="outside of its decoder block"):
        model.get_base_model().model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 32))


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_inference_mode_gives_the_same_logits_and_can_be_left_again(made_in_inference_mode):
    expected = logits(tiny_moa())
    with torch.inference_mode(made_in_inference_mode):
        model = tiny_moa()
    with torch.inference_mode():
        torch.testing.assert_close(model(**padded()).logits, expected)
    torch.testing.assert_close(logits(model), expected)
    if not made_in_inference_mode:
        model(**padded()).logits.sum().backward()
        assert gradients(model).keys() == adapter_tensors(model).keys()


@pytest.mark.parametrize("weights", ["moa_prompt", "k_proj.weight"])
def test_a_change_of_weights_acts_at_once_even_if_torch_does_not_count_it(weights):
    config = tiny_config(experts=[moa.PromptExpert(length=3)])
    model, fresh = tiny_moa(config), tiny_moa(config)
    logits(model)
    for name, parameter in model.named_parameters():
        if weights in name:
            parameter.data.mul_(2)  # as fused optimisers do: the tensor's version stays
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(fresh))
    assert not torch.allclose(logits(fresh), logits(tiny_moa(config)), atol=1e-3)


def test_the_keys_of_a_prompt_are_computed_once_per_cache():
    model, calls = tiny_moa(), []
    model.get_base_model().model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1) and None)
    model.generate(input_ids=tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(calls) == 5 + 1


# --- several adapters at once -----------------------------------------------------------------------------------------


def lora(target, r=2):
    return moa.LoraExpert(targets=[target], r=r, alpha=r)


def test_two_active_adapters_add_up():
    """Two adapters, each under its own linear router, are one adapter whose router has the rows of both."""
    router = moa.Router(hidden_per_expert=0)

    def config(*experts):
        return tiny_config(experts=list(experts), router=router, gating="soft")

    one, two = (lora("q"), moa.PromptExpert(length=3)), (lora("q", 3), moa.ParallelExpert(size=4))
    model = tiny_moa(config(*one))
    model.add_adapter("second", config(*two))
    perturb(model.eval(), 2, "second")
    model.base_model.set_adapter(["default", "second"])
    joined = tiny_moa(config(one[0], two[0], one[1], two[1]))
    first, second = adapter_tensors(model), adapter_tensors(model, "second")
    with torch.no_grad():
        for name, parameter in joined.named_parameters():
            if not is_adapter(name):
                continue
            other = name.replace(".default.", ".second.")
            if "mixture.moa_w2" in name:  # columns: q, q#2, prompt, parallel
                a, b = first[name], second[other]
                parameter.copy_(torch.stack([a[0], b[0], a[1], b[1]]))
            elif "mixture_q#2" in name:
                parameter.copy_(second[other.replace("#2", "")])
            else:
                parameter.copy_(first[name] if name in first else second[other])
    torch.testing.assert_close(logits(model), logits(joined))


# --- offloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_offloaded_base_gives_the_same_logits(when):
    expected = logits(tiny_moa())
    base = tiny_llama()
    if when == "before":
        tensors = {name: t.clone() for name, t in base.state_dict().items()}
        cpu_offload(base, torch.device("cpu"), state_dict=tensors)
        assert base.model.layers[0].self_attn.q_proj.weight.is_meta
        model = perturb(get_peft_model(base, tiny_config()).eval())
        assert not any(p.is_meta for name, p in model.named_parameters() if is_adapter(name))
    else:
        model = tiny_moa()
        tensors = {name: t.clone() for name, t in model.state_dict().items()}
        cpu_offload(model, torch.device("cpu"), state_dict=tensors)
        assert all(p.is_meta for p in model.parameters())
    # An offloaded block calls its layers one by one; a block in place computes some of them together.
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_loads_onto_an_offloaded_base(tmp_path):
    tiny_moa().save_pretrained(tmp_path)
    base = tiny_llama()
    cpu_offload(base, torch.device("cpu"), offload_buffers=False)
    model = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(model), logits(tiny_moa()))


@pytest.mark.parametrize("removed", [False, True], ids=["hooked", "hook removed"])
def test_accelerate_hooks_on_a_block_do_not_bypass_its_router(removed):
    base = tiny_llama()
    for block in base.model.layers:
        add_hook_to_module(block, ModelHook())
        if removed:
            remove_hook_from_module(block)
    assert "forward" in vars(base.model.layers[0])  # bound to the block's former class
    model = perturb(get_peft_model(base, tiny_config()).eval())
    assert torch.equal(logits(model), logits(tiny_moa()))
    for block in base.model.layers:
        remove_hook_from_module(block)
    assert torch.equal(logits(model), logits(tiny_moa()))
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))


# --- precision --------------------------------------------------------------------------------------------------------


def test_autocast_is_close_to_full_precision_and_keeps_fp32_gradients():
    model = prepared(tiny_moa(tiny_config(gating="soft")))
    loss_of(model, tokens()).backward()
    full = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, tokens()).backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        similarity = nn.functional.cosine_similarity(gradient.flatten(), full[name].flatten(), dim=0)
        assert similarity > 0.95, name
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model.eval())
    torch.testing.assert_close(rounded.float(), logits(model), atol=0.25, rtol=0.05)


@pytest.mark.parametrize("gating", [moa.TopK(k=3), moa.Threshold()])
def test_a_float64_model_decodes_in_float64(gating):
    model, text = tiny_moa(tiny_config(gating=gating)).double(), tokens(2, 5)
    many = torch.cat([text] * 20)
    found, expected = (logits(model, input_ids=ids) for ids in (text, many))
    torch.testing.assert_close(found, expected[:2], rtol=1e-10, atol=1e-10)


def test_a_bf16_base_trains_fp32_adapters():
    reference = prepared(tiny_moa(tiny_config(gating="soft")))
    loss_of(reference, tokens()).backward()
    full = gradients(reference)
    model = prepared(perturb(get_peft_model(tiny_llama().to(torch.bfloat16), tiny_config(gating="soft"))))
    loss_of(model, tokens()).backward()
    assert gradients(model).keys() == full.keys()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert nn.functional.cosine_similarity(gradient.flatten(), full[name].flatten(), dim=0) > 0.95, name


# --- compiling --------------------------------------------------------------------------------------------------------


def block_and_inputs(model):
    base = model.get_base_model().model
    hidden = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8).expand(2, 8)
    return base.layers[0], hidden, base.rotary_emb(hidden, positions)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_block_equals_the_eager_one(backend):
    torch.compiler.reset()
    model = prepared(tiny_moa())
    block, hidden, rotary = block_and_inputs(model)

    def run(function):
        x = hidden.clone().requires_grad_()
        output = function(x, position_embeddings=rotary)
        output.square().sum().backward()
        found = gradients(model) | {"input": x.grad}
        model.zero_grad()
        return output.detach(), found

    expected, gradient = run(block)
    output, found = run(torch.compile(block, fullgraph=True, backend=backend))
    torch.testing.assert_close(output, expected)
    assert found.keys() == gradient.keys()
    for name in gradient:
        torch.testing.assert_close(found[name], gradient[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "preset"),
    [("llama", "soft-moa"), ("llama", "sparse-moa"), ("llama", "instance-moa"), ("llama", "molora")]
    + [(family, "soft-moa") for family in ("gemma3_text", "olmo2", "phi3", "gpt_neox")],
)
def test_a_whole_model_decodes_in_one_graph(family, preset):
    """What serves with static caches and CUDA graphs: nothing of a mixture may break the graph."""
    torch.compiler.reset()
    model = perturb(get_peft_model(build_family(family), moa.preset(preset))).eval()
    ids = tokens(1, 6)

    def decoded(function):
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
            return function(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits

    expected = decoded(model)
    found = decoded(torch.compile(model, fullgraph=True, backend="eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_block_sees_the_adapter_switched_off():
    torch.compiler.reset()
    model = tiny_moa()
    block, hidden, rotary = block_and_inputs(model)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        acting = compiled(hidden, position_embeddings=rotary)
        with model.disable_adapter():
            off = compiled(hidden, position_embeddings=rotary)
        plain = tiny_llama().model.layers[0](hidden, position_embeddings=rotary)
    torch.testing.assert_close(off, plain)
    assert not torch.allclose(acting, plain, atol=1e-2)


@pytest.mark.parametrize("whose", ["prompt", "base"])
def test_prompt_keys_that_are_kept_for_inference_follow_changed_weights(whose: str) -> None:
    model = get_peft_model(tiny_llama(), moa.preset("prompt", init_weights=False)).eval()
    tokens = torch.arange(3, 9).unsqueeze(0)
    attention = model.base_model.model.model.layers[0].self_attn
    with torch.no_grad():
        model(tokens)
        weight = attention.k_proj.weight if whose == "base" else attention.mixture_prompt.moa_prompt["default"].weight
        weight.mul_(-3)
        kept = model(tokens).logits
    torch.testing.assert_close(kept, model(tokens).logits.detach())
