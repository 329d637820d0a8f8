"""Packed mixtures compute what their experts compute, in transformers, without any engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, build_family
from peft import get_peft_model
from tiny import adapter_tensors, padded, perturb, tiny_config, tiny_llama, tiny_moa, tokens
from tiny import logits as logits_of
from torch import Tensor, nn

import moa
from moa.adapters.experts import LoraLayer
from moa.serving.packing import CHILD, Packed
from moa.serving.shards import Processes, Share, part

CLOSE = {"atol": 1e-9, "rtol": 1e-9}  # in float64: random mixtures are too badly conditioned for less
ROUNDED = {"atol": 1e-3, "rtol": 1e-3}
STACKED = ("mixtral", "qwen3_moe", "gpt_oss")  # torch multiplies stacked experts in float32 at most

EVERY_KIND = [
    moa.LoraExpert(targets=["q", "k", "v", "o", "gate", "up", "down"], r=2),
    moa.Ia3Expert(),
    moa.AdapterExpert(size=4),
    moa.ParallelExpert(size=4),
    moa.PromptExpert(length=3),
]
EVERY_KIND_IN_COPIES = [
    moa.LoraExpert(targets=["q", "down"], r=2, copies=moa.Copies(3, bias=True)),
    moa.LoraExpert(targets=["v"], r=2, copies=moa.Copies(2, shared=True, bias=True)),
    moa.Ia3Expert(copies=moa.Copies(2, bias=True)),
    moa.AdapterExpert(size=4, copies=2),
    moa.ParallelExpert(size=4, copies=moa.Copies(2, shared=True, gating=moa.TopK(k=1, balance=0.1))),
    moa.PromptExpert(length=3, copies=3),
]
CONFIGS: dict[str, dict[str, Any]] = {
    "soft": {},
    "attention": {"router": moa.Router(input="attention")},
    "linear": {"router": moa.Router(hidden_per_expert=0, bias=False, input="attention")},
    "threshold": {"gating": moa.Threshold()},
    "topk": {"gating": moa.TopK(k=2), "router": moa.Router(input="attention")},
    "softmax": {"gating": moa.Softmax()},
    "ungated": {"router": None},
}


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    """Of so many tokens that transformers computes all of it in float64."""
    return logits_of(model, **(inputs or padded(rows=3, length=16)))


def mixture(config: moa.MoAConfig | None = None) -> Any:
    return tiny_moa(config).double()


def pack(model: nn.Module, *adapters: str, mask: Tensor | None = None, processes: Processes | None = None) -> Packed:
    token = torch.zeros(1, 1, dtype=torch.long)
    return Packed(model, adapters or ("default",), lambda: model(input_ids=token), mask, processes)


@pytest.mark.parametrize("experts", [EVERY_KIND, EVERY_KIND_IN_COPIES], ids=["one", "copies"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_every_kind_under_every_router(experts, settings):
    model = mixture(moa.MoAConfig(experts=experts, **settings))
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny_llama().double()), atol=0.1)
    pack(model)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("name", ["soft-moa", "sparse-moa", "lora", "molora", "hydralora", "adamole", "topk-molora"])
def test_presets(name):
    model = mixture(moa.preset(name))
    expected = logits(model)
    pack(model)
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["block", "attention"])
def test_families(family, stage):
    """Fused projections, MLPs whose layers the block calls itself, experts, post-norms."""
    of = FAMILIES[family]
    experts: list[Any] = [
        moa.LoraExpert(targets=["q", "k", "v", "o", *(["down"] if of.down else [])], r=2),
        moa.Ia3Expert(targets=["k", "v"]),
        moa.ParallelExpert(size=4),
    ]
    experts += [moa.PromptExpert(length=3)] if of.prompt else []
    config = moa.MoAConfig(experts=experts, router=moa.Router(input=stage))
    exact = family not in STACKED
    dtype = torch.float64 if exact else torch.float32
    model = perturb(get_peft_model(build_family(family, dtype=dtype), config).eval())
    ids = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = logits(model, input_ids=ids)
    pack(model)
    torch.testing.assert_close(logits(model, input_ids=ids), expected, **(CLOSE if exact else ROUNDED))


def test_generation_with_a_cache():
    model = mixture(tiny_config(router=moa.Router(input="attention")))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**padded(), **settings)
    pack(model)
    assert torch.equal(model.generate(**padded(), **settings), expected)


def test_new_weights_go_into_the_same_tensors():
    model = mixture()
    packed = pack(model)
    before = {name: buffer for name, buffer in model.named_buffers() if CHILD in name}
    perturb(model, seed=3)
    expected = logits(perturb(mixture(), seed=3))
    assert not torch.allclose(logits(model), expected, atol=0.1)
    packed.refresh()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    after = {name: buffer for name, buffer in model.named_buffers() if CHILD in name}
    assert all(after[name] is buffer for name, buffer in before.items())
    assert after.keys() == before.keys()


def test_blocks_without_experts_are_left_alone():
    model = mixture(tiny_config(layers_to_transform=[1]))
    expected = logits(model)
    pack(model)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert [hasattr(block, CHILD) for block in model.base_model.model.model.layers] == [False, True]


def test_rows_of_one_batch_ask_for_different_adapters():
    """Two mixtures of different shape, one without a router, and the base: each row as if it were alone."""
    model = tiny_moa()
    plain = moa.MoAConfig(experts=EVERY_KIND, router=None, init_weights=False)
    model.add_adapter("plain", plain)
    perturb(model, seed=5, adapter="plain").double()
    ids = tokens(rows=3, length=16)
    alone: dict[str, Tensor] = {"base": logits(tiny_llama().double(), input_ids=ids)}
    for name in ("default", "plain"):
        model.set_adapter(name)
        alone[name] = logits(model, input_ids=ids)
    mask = torch.zeros(64, 2)
    pack(model, "default", "plain", mask=mask)
    length = ids.shape[1]
    mask[:length, 1] = 1
    mask[2 * length : 3 * length, 0] = 1
    together = logits(model, input_ids=ids)
    for row, name in enumerate(["plain", "base", "default"]):
        torch.testing.assert_close(together[row], alone[name][row], **CLOSE)


def test_half_precision_stays_close():
    model = tiny_moa()
    expected = logits(model)
    half = model.to(torch.bfloat16)
    there = (logits(half).float() - expected).abs().mean()
    pack(half)
    assert (logits(half).float() - expected).abs().mean() < 2 * there


def test_an_expert_that_an_engine_passes_by_is_refused():
    model = tiny_moa()
    mlp = model.base_model.model.model.layers[1].mlp
    mlp.forward = lambda x: torch.zeros_like(x)  # as a kernel that computes the whole module by itself
    with pytest.raises(ValueError, match=r"lora expert at 'down' of block 1 cannot be served: .* Linear without"):
        pack(model)


def test_a_kind_without_a_form_is_refused(monkeypatch):
    monkeypatch.delattr("moa.adapters.experts.bottleneck.BottleneckLayer.form")
    with pytest.raises(ValueError, match="lora expert does not say its form"):
        pack(tiny_moa())


def test_packing_leaves_the_saved_state_alone():
    model = tiny_moa()
    before = set(model.state_dict())
    pack(model)
    assert set(model.state_dict()) == before
    assert any(isinstance(module, LoraLayer) for module in model.modules())


class Columns(nn.Linear):
    """A linear layer of which a process computes some outputs."""

    own: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[self.own])


class Rows(nn.Linear):
    """One of whose input a process has some features; the output is whole in all of them."""

    own: Tensor
    total: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.total(F.linear(x, self.weight[:, self.own]))


class Threads:
    """As many threads as an engine has processes, and what they add up."""

    def __init__(self, ranks: int):
        self._ranks = range(ranks)
        self._here = threading.Barrier(ranks, timeout=120)
        self._given: dict[int, Tensor] = {}

    def total(self, rank: int, x: Tensor) -> Tensor:
        self._given[rank] = x
        self._here.wait()
        result = sum(self._given[other] for other in self._ranks)
        self._here.wait()
        return result  # type: ignore[return-value]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def alone(rank: int) -> Any:
            try:
                with torch.no_grad():
                    return work(rank)
            except BaseException:
                self._here.abort()  # so that the others do not wait for this one
                raise

        with ThreadPoolExecutor(len(self._ranks)) as pool:
            return list(pool.map(alone, self._ranks))


def split(model: nn.Module, rank: int, ranks: int, total: Callable[[Tensor], Tensor]) -> Processes:
    """Let a Llama compute one process's share, as engines split it."""
    shares: dict[nn.Module, Share] = {}
    for name, module in model.named_modules():
        _, _, last = name.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            module.__class__, module.own = Columns, part(module.out_features, rank, ranks)
            shares[module] = Share(outputs=module.own)
        elif last in ("o_proj", "down_proj"):
            module.__class__, module.own = Rows, part(module.in_features, rank, ranks)
            module.total = total
            shares[module] = Share(inputs=module.own)
        elif last == "self_attn":
            shares[module] = Share(heads=part(module.config.num_attention_heads, rank, ranks))
    return Processes(lambda module: shares.get(module, Share()), total)


@pytest.mark.parametrize("experts", [EVERY_KIND, EVERY_KIND_IN_COPIES], ids=["one", "copies"])
@pytest.mark.parametrize("name", ["soft", "attention", "threshold", "ungated"])
def test_a_model_that_is_split_among_processes(experts, name):
    """Every process computes with its share of a mixture that it holds whole; new weights as well."""
    config = moa.MoAConfig(experts=experts, **CONFIGS[name])
    models = [mixture(config) for _ in range(2)]
    expected = logits(models[0])
    other = perturb(mixture(config), seed=3)
    changed, tensors = logits(other), adapter_tensors(other)
    assert not torch.allclose(changed, expected, atol=0.1)
    threads = Threads(2)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        model = models[rank]
        packed = pack(model, processes=split(model, rank, 2, lambda x: threads.total(rank, x)))
        first = logits(model)
        model.load_state_dict(tensors, strict=False)
        packed.refresh()
        return first, logits(model)

    for first, second in threads.run(work):
        torch.testing.assert_close(first, expected, **CLOSE)
        torch.testing.assert_close(second, changed, **CLOSE)
