"""Parity with the official implementation: its own numbers, and a dense model for what they do not cover."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from reference_model import Official, draw, official_shapes
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import moa
from moa.adapters.auxiliary import auxiliary_loss
from moa.adapters.block import Mixture
from moa.adapters.experts import ExpertLayer
from moa.adapters.reference.files import find_variant, import_reference
from moa.adapters.reference.weights import Checkpoint, model_slots

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/meta.json"))
COLUMNS = {
    **{"q": "Q", "k": "K", "v": "V", "prompt": "PROMPT", "o": "O", "up": "FFN_UP", "gate": "FFN_GATE"},
    **{"down": "FFN_DOWN", "parallel": "PADAPTER", "lora": "LORA (all targets)"},
}
SITES = {name: site for site, name in COLUMNS.items()}


def build_base(config, weights):
    """A transformers model of the golden ``config`` with ``weights`` under Hugging Face names, in float32."""
    fields = {k: v for k, v in config.items() if k not in ("model_type", "native_params_json", "rope_theta")}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    fields |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 128}
    qwen = config.get("model_type") == "qwen3"
    config = (Qwen3Config if qwen else LlamaConfig)(**fields, attn_implementation="eager")
    model = (Qwen3ForCausalLM if qwen else LlamaForCausalLM)(config)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


def base_weights(name):
    return {key: tensor.float() for key, tensor in load_file(GOLDEN / "_base" / f"base_{name}.safetensors").items()}


class Case:
    def __init__(self, name):
        self.name = name
        self.meta = json.loads((GOLDEN / name / "meta.json").read_text())
        self.tensors = load_file(GOLDEN / name / "case.safetensors")
        self.adapter = {k.removeprefix("adapter."): v for k, v in self.tensors.items() if k.startswith("adapter.")}
        self.padded = name.startswith("hf_")  # only this path has an attention mask

    def __getitem__(self, name):
        return self.tensors[name]

    def model(self):
        base = build_base(self.meta["config"], load_file(GOLDEN / self.meta["base"]))
        model = get_peft_model(base, moa.reference_config(self.meta["variant"], self.meta["adapter"]))
        moa.load_reference(model, self.adapter)
        return model.train()

    def batch(self):
        batch = {"input_ids": self["input_ids"]}
        return batch | ({"attention_mask": self["attention_mask"]} if self.padded else {})

    def compared(self):
        """(batch, tokens): where outputs are defined."""
        mask = self["attention_mask"].bool()
        return mask if self.padded else torch.ones_like(mask)


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def test_all_cases_are_there():
    assert len(CASES) == 11


def test_logits_and_loss(case):
    with torch.no_grad():
        output = case.model()(**case.batch(), labels=case["labels"])
    where = case.compared()
    torch.testing.assert_close(output.logits[where], case["logits"][where], atol=1e-5, rtol=0)
    expected = case.meta.get("cross_entropy") or case.meta["loss"]
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)


def test_gates(case):
    model = case.model()
    with torch.no_grad(), moa.gate_values(model) as record:
        model(**case.batch())
    where = case.compared()
    expected = [key for key in case.tensors if key.startswith("type_weights.")]
    assert len(record.gates) == len(expected)
    columns = case.meta["gate_columns"]
    for block, gates in record.gates.items():
        names = columns[str(block)] if isinstance(columns, dict) else columns
        assert [COLUMNS[name] for name in record.columns[block]] == names
        theirs = case[f"type_weights.{block}"].expand_as(gates)
        torch.testing.assert_close(gates[where], theirs[where], atol=1e-5, rtol=0)
        threshold = case.tensors.get(f"threshold.{block}")
        assert (record.thresholds[block] is None) == (threshold is None)
        if threshold is not None:
            torch.testing.assert_close(record.thresholds[block][where], threshold[where], atol=1e-5, rtol=0)
            assert torch.equal(gates[where] == 0, theirs[where] == 0)


def test_routes_among_copies(case):
    model = case.model()
    with torch.no_grad(), moa.gate_values(model) as record:
        model(**case.batch())
    modules = case.meta.get("route_modules_order") or []
    assert len(record.routes) == (3 if modules else 0)
    for block, routes in record.routes.items():
        assert {COLUMNS[site] for site in routes} == set(modules)
        for index, name in enumerate(modules):
            theirs = case[f"route.{block}"][:, :, index]
            torch.testing.assert_close(routes[SITES[name]], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["nat_adamole", "nat_topk_moelora"])
def test_balance_loss_scores_and_thresholds(name):
    case = Case(name)
    model, seen = case.model(), {}
    for mixture in (m for m in model.modules() if isinstance(m, Mixture)):
        for expert in (m for m in mixture.host.modules() if isinstance(m, ExpertLayer)):
            expert.mixture_copies.register_forward_hook(
                lambda router, args, gates, key=(mixture.index, expert.site): seen.update({key: (router, gates)})
            )
    model(**case.batch())
    for block in range(3):
        for index, module in enumerate(case.meta["route_modules_order"]):
            router, gates = seen[block, SITES[module]]
            gating = router.gating["default"]
            assert gating.balance == case.meta["adapter"]["lb_loss_coeff"]
            loss = auxiliary_loss(gates, gates.scores, None, gating) / gating.balance
            assert loss.item() == pytest.approx(case[f"lb_loss.{block}"][index].item(), rel=1e-5)
            raw = gates.scores if gates.threshold is None else gates.scores + gates.threshold
            torch.testing.assert_close(raw, case[f"gate_raw.{block}"][:, :, index], atol=1e-5, rtol=0)
            if gates.threshold is not None:
                theirs = case[f"threshold.{block}"][:, :, index]
                torch.testing.assert_close(gates.threshold, theirs, atol=1e-5, rtol=0)


def gradients(model, adapter):
    """Official name -> our gradient in the official shape, None where there is none; q and k rows in our order."""
    for parameter in model.parameters():
        parameter.data.copy_(torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad)
    checkpoint = Checkpoint.read(adapter)
    found = {checkpoint.full_name(*key): slot.destination for key, slot in model_slots(model, checkpoint).items()}
    return {n: None if g is None or g.isnan().all() else g for n, g in found.items() if n in adapter}


def in_our_order(name, gradient):
    """The golden README's recipe for rows of q and k of the native path; everything else as it is."""
    heads = 4 if "lora_Q" in name else 2
    if not name.startswith("llama.") or "lora_B" not in name or not ("lora_Q" in name or "lora_K" in name):
        return gradient
    rank = gradient.shape[1]
    return gradient.view(heads, 8, 2, rank).transpose(1, 2).reshape(heads * 16, rank)


def test_gradients(case):
    model = case.model()
    model(**case.batch(), labels=case["labels"]).loss.backward()
    ours = gradients(model, case.adapter)
    theirs = load_file(GOLDEN / case.name / "grads.safetensors")
    theirs = {name.removeprefix("grad."): gradient for name, gradient in theirs.items()}
    assert {name for name, gradient in ours.items() if gradient is None} == set(case.meta["no_grad_params"])
    assert theirs.keys() == ours.keys() - set(case.meta["no_grad_params"])
    for name, expected in theirs.items():
        expected = in_our_order(name, expected)
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        sums = case.tensors.get(f"gradsum.{name}")
        if sums is not None:
            flat = ours[name].reshape(ours[name].shape[0], -1)
            # Row sums of q and k depend on the order of rows, so they are taken from the golden tensor's order.
            rows = in_our_order(name, sums[: flat.shape[0]].unsqueeze(1)).squeeze(1)
            mine = torch.cat([flat.sum(1), flat.sum(0), flat.norm().reshape(1)])
            torch.testing.assert_close(mine, torch.cat([rows, sums[flat.shape[0] :]]), atol=5e-6, rtol=1e-4)


def generate(model, ids, mask, use_cache):
    kept = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return kept.sequences, torch.stack(kept.logits, 1)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generation(case, use_cache):
    model = case.model().eval()
    expected = case["gen.tokens_cache" if use_cache else "gen.tokens_nocache"]
    prompts = case["gen.prompt_ids"]
    if case.padded:
        tokens, logits = generate(model, prompts, case["gen.prompt_mask"], use_cache)
    else:
        texts = [row[:length].unsqueeze(0) for row, length in zip(prompts, case["gen.prompt_lens"], strict=True)]
        pairs = [generate(model, text, torch.ones_like(text), use_cache) for text in texts]
        tokens = torch.cat([t[:, text.shape[1] :] for (t, _), text in zip(pairs, texts, strict=True)])
        logits = torch.cat([logits for _, logits in pairs])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits[:, 0], case["gen.logits_first"], atol=1e-5, rtol=0)
    last = "gen.logits_last_nocache"
    last = last if not use_cache and last in case.tensors else "gen.logits_last"
    torch.testing.assert_close(logits[:, -1], case[last], atol=1e-5, rtol=0)


# --- what the golden files do not cover -----------------------------------------------------------------------------

LLAMA = json.loads((GOLDEN / "nat_lora" / "meta.json").read_text())["config"]
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32}
QWEN3.pop("native_params_json")
HF = json.loads((GOLDEN / "hf_llama_soft" / "meta.json").read_text())["adapter"]
NATIVE = json.loads((GOLDEN / "nat_sparse_moa" / "meta.json").read_text())["adapter"]
ALL7 = {"lora_targets": "Q,K,V,O,FFN_UP,FFN_GATE,FFN_DOWN"}
PARTIAL = {"lora_layers": "0-1,2-3", "p_adapter_layers": "1-3", "prompt_layers": "0-0"}
CONST = {"const_threshold": True, "max_threshold": 0.5, "swi_x": 0, "lora_targets": "Q,V,FFN_UP"}
MIXTURE = {"expert_num": 3, "lora_rank": 4, "prompt_layers": "0-0", "p_adapter_layers": "0-0"}

SYNTHETIC = {
    "llama_sparse_prompt": ("sparse", {**HF, "prompt_len": 10, "max_threshold": 0.5}, "llama"),
    "qwen3_soft": ("soft", HF, "qwen3"),
    "qwen3_soft_prompt": ("soft", {**HF, "prompt_len": 10}, "qwen3"),
    "qwen3_sparse": ("sparse", {**HF, "max_threshold": 0.5}, "qwen3"),
    "qwen3_sparse_swi0": ("sparse", {**HF, "max_threshold": 0.5, "swi_x": 0}, "qwen3"),
    "soft_e2hydra": ("LLaMA3_soft_moa", {**NATIVE, **ALL7, "expert_num": 2, "lora_alpha": 16}, "llama"),
    "instance_e2": ("LLaMA3_soft_moa_instance", {**NATIVE, "expert_num": 2, "hydra_moe": False}, "llama"),
    "unipeft_e2": ("LLaMA3_UniPEFT", {**NATIVE, "expert_num": 2}, "llama"),
    "sparse_all7": ("LLaMA3_sparse_moa", {**NATIVE, **ALL7}, "llama"),
    "sparse_const_partial": ("LLaMA3_sparse_moa", {**NATIVE, **PARTIAL, **CONST}, "llama"),
    "sparse_without_layer_1": ("LLaMA3_sparse_moa", {**NATIVE, **PARTIAL, "p_adapter_layers": "0-1"}, "llama"),
    "hydralora": ("LLaMA3_soft_moe", {**NATIVE, **MIXTURE}, "llama"),
    "parallel_prompt": ("LLaMA3_soft_moe", {**NATIVE, "lora_layers": "0-0"}, "llama"),
    "parallel_prompt_e2": (
        "LLaMA3_soft_moe",
        {**NATIVE, "lora_layers": "0-0", "expert_num": 2, "p_adapter_hydra": False},
        "llama",
    ),
    "adamole_single": (
        "LLaMA3_sparse_moe",
        {**NATIVE, **MIXTURE, "expert_num": 1, "adamole": True, "lb_loss_coeff": 0},
        "llama",
    ),
    "topk1": ("LLaMA3_sparse_moe", {**NATIVE, **MIXTURE, "adamole": False, "top_k": 1}, "llama"),
}


def synthetic(name, seed=0):
    variant, settings, base = SYNTHETIC[name]
    config = QWEN3 if base == "qwen3" else LLAMA
    weights = base_weights(base)
    tensors = draw(official_shapes(variant, settings, config), seed)
    return variant, settings, config, weights, tensors


def our_model(variant, settings, config, weights, tensors):
    model = get_peft_model(build_base(config, weights), moa.reference_config(variant, settings))
    moa.load_reference(model, tensors)
    return model.train()


def test_dense_model_agrees_with_the_official_one(case):
    base = {name: tensor.float() for name, tensor in load_file(GOLDEN / case.meta["base"]).items()}
    adapter = {name: tensor.float() for name, tensor in case.adapter.items()}
    meta = case.meta
    assert official_shapes(meta["variant"], meta["adapter"], meta["config"]) == {
        name: tuple(tensor.shape) for name, tensor in adapter.items()
    }
    dense = Official(meta["variant"], meta["adapter"], meta["config"], base, adapter)
    logits = dense.logits(case["input_ids"], case["attention_mask"] if case.padded else None)
    torch.testing.assert_close(logits[case.compared()], case["logits"][case.compared()], atol=1e-5, rtol=0)
    if dense.lb_losses:
        assert sum(dense.lb_losses).item() == pytest.approx(meta["lb_loss_total"], rel=1e-5)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_case_agrees_with_the_dense_model(name):
    variant, settings, config, weights, tensors = synthetic(name)
    ids = torch.randint(1, 101, (3, 11), generator=torch.Generator().manual_seed(1))
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    dense = Official(variant, settings, config, weights, leaves)
    expected = dense.logits(ids)
    balance = settings.get("lb_loss_coeff", 0.001) if variant == "LLaMA3_sparse_moe" else 0.0
    (cross_entropy(expected) + balance * sum(dense.lb_losses)).backward()

    model = our_model(variant, settings, config, weights, tensors)
    with moa.gate_values(model) as record:
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    for block, gates in record.gates.items():
        torch.testing.assert_close(gates, dense.gates[block].detach().expand_as(gates), atol=1e-5, rtol=0)
        names = ["LORA (all targets)", "PROMPT", "PADAPTER"] if "UniPEFT" in variant else dense.names(block)
        assert [COLUMNS[column] for column in record.columns[block]] == names
    for (block, target), route in dense.routes.items():
        torch.testing.assert_close(record.routes[block][SITES[target]], route.detach(), atol=1e-5, rtol=0)

    cross_entropy(logits).backward()
    ours = gradients(model, tensors)
    for key, leaf in leaves.items():
        if leaf.grad is None or ours.get(key) is None:  # zero for one and absent for the other is the same
            gradient = leaf.grad if leaf.grad is not None else ours.get(key)
            unused = "adamole_single" in name and ("router" in key or "threshold" in key)
            assert gradient is None or gradient.abs().max() < 1e-6 or unused, key
            continue
        grid = in_synthetic_order(key, leaf.grad, config)
        torch.testing.assert_close(ours[key], grid, atol=2e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def cross_entropy(logits):
    """A loss on every token; auxiliary losses weigh what they weigh beside a loss of this kind."""
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def in_synthetic_order(name, gradient, config):
    return gradient if config is QWEN3 else in_our_order(name, gradient)


def test_gates_of_the_sparse_synthetic_cases_are_mixed():
    variant, settings, config, weights, tensors = synthetic("sparse_const_partial")
    model = our_model(variant, settings, config, weights, tensors)
    with moa.gate_values(model) as record:
        model(torch.arange(1, 31).view(3, 10))
    for gates in record.gates.values():
        assert 0.02 < (gates == 0).float().mean() < 0.98


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_config_survives_saving(name, tmp_path):
    case = Case(name)
    config = moa.reference_config(case.meta["variant"], case.meta["adapter"])
    config.save_pretrained(tmp_path)
    loaded = moa.MoAConfig.from_pretrained(tmp_path)
    assert (loaded.experts, loaded.router, loaded.gating) == (config.experts, config.router, config.gating)


def test_transformers_defaults_are_what_its_files_hard_code():
    config = moa.reference_config("sparse", {})
    lora, parallel = config.experts
    assert (lora.r, lora.alpha, lora.targets, lora.layers) == (8, 8, ["q", "k", "v", "o", "down"], None)
    assert (parallel.size, parallel.layers) == (16, None)
    assert (config.router.hidden_per_expert, config.router.input) == (4, "attention")
    assert (config.gating.gamma_max, config.gating.train_threshold) == (0.5, "frozen")


@pytest.mark.parametrize(
    ("given", "constant", "gamma_max"),
    [(True, True, 0.3), (False, False, 0.3), (None, False, 0.3), (0.7, True, 0.7), (0, False, 0.3)],
)
def test_const_threshold_is_a_flag_or_a_value(given, constant, gamma_max):
    settings = {"lora_layers": "0-1", "const_threshold": given, "max_threshold": 0.3}
    gating = moa.reference_config("LLaMA3_sparse_moa", settings).gating
    assert (gating.constant, gating.gamma_max) == (constant, gamma_max)


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("LLaMA3_softmoa", {}, r"variant='LLaMA3_softmoa' is not one of .*did you mean 'LLaMA3_soft_moa'"),
        ("LLaMA3_soft_moa", {"lora_rnak": 8}, r"'lora_rnak' \(did you mean 'lora_rank'"),
        ("LLaMA3_soft_moa", {"lora_layers": "0:3"}, r"lora_layers='0:3' must be ranges"),
        ("LLaMA3_soft_moa", {"lora_layers": 3}, r"lora_layers=3 must be ranges"),
        ("LLaMA3_soft_moa", {"lora_layers": "0-1", "lora_targets": "Q,DOWN"}, r"lora_targets='DOWN'.*FFN_DOWN"),
        ("LLaMA3_soft_moa", {}, r"no expert into any layer"),
        ("LLaMA3_soft_moa", {"lora_layers": "0-1", "w_bias": True}, r"w_bias=True has no counterpart"),
        ("LLaMA3_soft_moa", {"lora_layers": "0-1", "expert_num": 0}, r"expert_num=0 is outside"),
        ("LLaMA3_sparse_moe", {"lora_layers": "0-1", "noisy_router": True}, r"noisy_router=True has no counterpart"),
        ("LLaMA3_soft_moa_instance", {"lora_layers": "0-1", "lora_targets": "FFN_GATE"}, r"cannot adapt"),
        ("LLaMA3_UniPEFT", {"lora_layers": "0-3", "p_adapter_layers": "0-3"}, r"LLaMA3_UniPEFT runs only with"),
    ],
)
def test_bad_settings_are_named(variant, settings, message):
    with pytest.raises(ValueError, match=message):
        moa.reference_config(variant, settings)


def test_targets_do_not_matter_without_lora():
    settings = {"lora_layers": "0-0", "lora_targets": "", "lora_rank": None, "prompt_layers": "0-2"}
    config = moa.reference_config("LLaMA3_soft_moe", settings)
    assert [(expert.kind, expert.layers) for expert in config.experts] == [("prompt", [0, 1])]
    assert config.router is None


def test_descriptions_are_ignored():
    moa.reference_config("soft", {"bf16": True, "scaling": 1.0, "router": "w2(...)", "note to self": "nothing"})


# --- failing checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def soft():
    case = Case("nat_soft_moa")
    base = build_base(case.meta["config"], load_file(GOLDEN / case.meta["base"]))
    return get_peft_model(base, moa.reference_config(case.meta["variant"], case.meta["adapter"])), case.adapter


def assert_refused(model, tensors, *messages):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=messages[0]) as error:
        moa.load_reference(model, tensors)
    for message in messages:
        assert message in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_tensors_are_named(soft):
    model, tensors = soft
    extra = {"llama.layers.0.attention.lora_X.weight": torch.zeros(1), "llama.norm.weight": torch.zeros(1)}
    assert_refused(model, tensors | extra, "unknown", *extra)
    extra = {"llama.layers.3.adapter_type_router.w1.bias": torch.zeros(28)}  # the model has three layers
    assert_refused(model, tensors | extra, "unknown", *extra)


@pytest.mark.parametrize(
    "name", ["adapter_type_router.w2.bias", "attention.prompt_gate", "attention.lora_Q.lora_B.weight"]
)
def test_missing_tensors_are_named(soft, name):
    model, tensors = soft
    name = f"llama.layers.1.{name}"
    assert_refused(model, {key: tensor for key, tensor in tensors.items() if key != name}, "missing", name)


def test_wrong_shapes_are_named(soft):
    model, tensors = soft
    name = "llama.layers.2.attention.lora_K.lora_A.weight"
    assert_refused(model, tensors | {name: torch.zeros(4, 64)}, "shape", name, "(4, 64)", "(8, 64)")


def test_checkpoint_of_another_variant_is_refused(soft):
    assert_refused(soft[0], Case("nat_sparse_moa").adapter, "unknown", "llama.layers.0.adapter_threshold_fn.weight")


def test_tensors_that_the_official_code_never_uses_are_accepted():
    case = Case("nat_sparse_moa")
    noise = {"adapter_noise_linear.weight": torch.zeros(7, 64), "adapter_noise_linear.bias": torch.zeros(7)}
    moa.load_reference(case.model(), case.adapter | {f"llama.layers.0.{k}": v for k, v in noise.items()})


def test_model_without_mixture_is_refused():
    model = build_base(LLAMA, base_weights("llama"))
    with pytest.raises(ValueError, match="one active mixture"):
        moa.load_reference(model, {})


def test_expert_the_official_code_does_not_have_is_refused():
    model = get_peft_model(build_base(LLAMA, base_weights("llama")), moa.MoAConfig(experts=[moa.Ia3Expert()]))
    with pytest.raises(ValueError, match="no expert like this model's 'ia3_k'"):
        moa.load_reference(model, {})


# --- ways in ----------------------------------------------------------------------------------------------------------


def test_plain_names_injected_models_and_bfloat16(soft):
    model, tensors = soft
    case = Case("nat_soft_moa")
    plain = {name.removeprefix("llama."): tensor for name, tensor in tensors.items()}
    base = build_base(LLAMA, base_weights("llama"))
    injected = inject_adapter_in_model(moa.reference_config(case.meta["variant"], case.meta["adapter"]), base)
    moa.load_reference(injected, plain)
    with torch.no_grad():
        torch.testing.assert_close(injected(case["input_ids"]).logits, case["logits"], atol=1e-5, rtol=0)
    moa.load_reference(model.to(torch.bfloat16), plain)
    weight = model.base_model.model.model.layers[0].mlp.down_proj.mixture_down.moa_A["default"].weight
    theirs = tensors["llama.layers.0.feed_forward.lora_DOWN.lora_A.weight"]
    assert torch.equal(weight, theirs.to(torch.float32).to(torch.bfloat16))


def official_folder(case, folder, weights, settings):
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.float() for name, tensor in case.adapter.items()}
    if weights.endswith("safetensors"):
        save_file(tensors, folder / weights)
    else:
        torch.save(tensors, folder / weights)
    if settings:
        (folder / settings).write_text(json.dumps(case.meta["adapter"]))
    return folder


@pytest.mark.parametrize(
    ("name", "weights", "settings", "variant"),
    [
        ("nat_soft_moa", "adapter.pth", "adapter_params.json", "LLaMA3_soft_moa"),
        ("nat_sparse_moa", "adapter.safetensors", "adapter_params.json", None),
        ("nat_unipeft", "adapter.pth", "adapter_params.json", None),
        ("nat_adamole", "adapter.pth", "adapter_params.json", None),
        ("nat_molora", "adapter.pth", "adapter_params.json", None),
        ("hf_llama_soft_prompt", "adapter_model.bin", "adapter_config.json", None),
        ("hf_llama_sparse", "adapter_model.safetensors", None, None),
    ],
)
def test_imported_adapter_is_an_ordinary_one(name, weights, settings, variant, tmp_path):
    case = Case(name)
    base = build_base(case.meta["config"], load_file(GOLDEN / case.meta["base"]))
    base.save_pretrained(tmp_path / "base")
    source = official_folder(case, tmp_path / "source", weights, settings)
    import_reference(source, tmp_path / "base", tmp_path / "out", variant)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        logits = model(**case.batch()).logits
    torch.testing.assert_close(logits[case.compared()], case["logits"][case.compared()], atol=1e-5, rtol=0)


def test_import_command(tmp_path, capsys):
    from moa.cli.import_reference import import_reference as command

    case = Case("nat_lora")
    build_base(case.meta["config"], load_file(GOLDEN / case.meta["base"])).save_pretrained(tmp_path / "base")
    source = official_folder(case, tmp_path / "source", "adapter.pth", "adapter_params.json")
    command(source / "adapter.pth", str(tmp_path / "base"), tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "experts: lora" in capsys.readouterr().out


def test_import_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter\.pth"):
        import_reference(tmp_path, "base", tmp_path / "out")
    torch.save({"model": {}, "args": Path("x")}, tmp_path / "adapter.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        import_reference(tmp_path, "base", tmp_path / "out")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "adapter.pth")
    with pytest.raises(ValueError, match="not a plain dictionary"):
        import_reference(tmp_path, "base", tmp_path / "out")
    official_folder(Case("nat_soft_moa"), tmp_path, "adapter.pth", None)
    with pytest.raises(ValueError, match="LLaMA3_soft_moa_instance: say so"):
        import_reference(tmp_path, "base", tmp_path / "out")
    with pytest.raises(ValueError, match="did you mean 'soft'"):
        import_reference(tmp_path, "base", tmp_path / "out", "sof")
    (tmp_path / "adapter_params.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        import_reference(tmp_path, "base", tmp_path / "out", "LLaMA3_soft_moa")
    (tmp_path / "adapter_params.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        import_reference(tmp_path, "base", tmp_path / "out", "LLaMA3_soft_moa")


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("nat_soft_moa", "nat_instance_moa")])
def test_variant_is_found_out(name):
    case = Case(name)
    settings = {} if case.padded or "moe" not in case.meta["variant"] else case.meta["adapter"]
    assert find_variant(case.adapter, settings) == case.meta["variant"]
