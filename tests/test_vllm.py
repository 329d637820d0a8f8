"""vLLM answers as transformers does. Needs vLLM; `make serve-test` runs these in an environment of its own.

Everything is float32 and on one thread: greedy tokens have to be equal, log-probabilities close. Engines run inside of
this process. What transformers says is asked before the first engine starts, since vLLM changes transformers' classes.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm")

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import perturb, seeded
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moa
from moa import models
from moa.data.templates import completion_of, prompt_of
from moa.serving.releases import WORKER
from moa.tasks import TASKS

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("default"), pytest.mark.timeout(1800)]

NEW = 12
CLOSE = 5e-4  # in log-probabilities: what float32 itself is off by on a pretrained base
CLOSE_AT_RANDOM = 2e-3  # random weights magnify roundings; the worst of 64 answers was off by 4.8e-4

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "olmo2": {},
    "stablelm": {"qk_layernorm": True},
    "cohere2": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama-mqa": {"num_key_value_heads": 1},
}
STACKED = ("mixtral",)
NOT_SPLIT = ("phi3", "stablelm")
"""Families that vLLM's Transformers backend does not run on several processes, with or without a mixture."""

REFUSED = (ValueError, RuntimeError)  # an engine of several processes says RuntimeError for what one of them raised


class Answer(NamedTuple):
    tokens: list[int]
    log_probabilities: list[float]


class Case(NamedTuple):
    """A mixture on a base, and what transformers answers to some prompts."""

    base: str
    adapter: str
    prompts: list[list[int]]
    answers: list[Answer]


# --- what transformers says -------------------------------------------------------------------------------------------


def every_kind(stacked: bool, **fields: Any) -> moa.MoAConfig:
    """All kinds of experts, copies among them."""
    targets = ["q", "k", "v", "o", *([] if stacked else ["gate", "up", "down"])]
    experts = [
        moa.LoraExpert(targets=targets, r=2, optional=True),
        moa.LoraExpert(targets=["q"], r=2, copies=moa.Copies(3, bias=True)),
        moa.Ia3Expert(targets=["k", "v", *([] if stacked else ["down"])]),
        moa.AdapterExpert(size=4),
        moa.ParallelExpert(size=4, copies=2),
        moa.PromptExpert(length=3),
    ]
    return moa.MoAConfig(experts=experts, **fields)


def tiny_base(family: str, folder: Path) -> Path:
    settings = SHAPE | FAMILIES[family]
    with seeded(0):
        config = AutoConfig.for_model(
            family.removesuffix("-mqa"), **{k: v for k, v in settings.items() if v is not None}
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def random_prompts(vocabulary: int, number: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (3 + 7 * i % 60,), generator=generator).tolist() for i in range(number)]


def questions(tokenizer: Any, number: int) -> list[list[int]]:
    rows = TASKS["bookings"].generate("test", number)
    return [tokenizer(prompt_of(row, "short"))["input_ids"] for row in rows]


def trained(base: str, config: moa.MoAConfig, folder: Path, *, steps: int, rows: int) -> str:
    """A few steps on the demonstration's task: random mixtures of a pretrained base are too badly conditioned."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with seeded(0):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        data = TASKS["bookings"].generate("train", steps * rows)
        for step in range(steps):
            batch = [prompt_of(row, "short") + completion_of(row) for row in data[step * rows : (step + 1) * rows]]
            ids = [torch.tensor(tokenizer(text)["input_ids"][-96:]) for text in batch]
            inputs = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
            model(input_ids=inputs, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def answers_of(
    base: str, adapter: str | None, prompts: list[list[int]], new: int = NEW, prepare: Callable[[Any], object] = id
) -> list[Answer]:
    eager = {"attn_implementation": "eager"}  # the only one of transformers' that caps logits, as Gemma 2 and vLLM do
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **eager)
    prepare(model)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    answers = []
    for prompt in prompts:
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
        output = model.generate(input_ids=torch.tensor([prompt]), pad_token_id=0, **settings)[0]
        logits = model(input_ids=output[None]).logits[0, len(prompt) - 1 : -1]
        tokens = output[len(prompt) :]
        answers.append(Answer(tokens.tolist(), logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()))
    return answers


def tiny_case(family: str, folder: Path) -> Case:
    base, adapter = str(tiny_base(family, folder / "base")), str(folder / "adapter")
    stage = ("attention", "block")[list(FAMILIES).index(family) % 2]
    config = every_kind(family in STACKED, router=moa.Router(input=stage))
    perturb(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)).save_pretrained(adapter)
    prompts = random_prompts(97, 64)
    return Case(base, adapter, prompts, answers_of(base, adapter, prompts))


class Int8Linear(torch.nn.Linear):
    """Eight bits for weights, by rows, and for what is read, by tokens; the arithmetic is transformers' own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / scale).round() * scale)


def int8(base: Path, packed: Path) -> None:
    """Save a base in eight bits as vLLM reads them; in place, ``base`` becomes the same numbers in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors = dict(model.named_parameters())
    for name in [name for name in tensors if "_proj." in name]:
        weight = tensors.pop(name).data
        scale = weight.abs().amax(-1, keepdim=True) / 63  # not 127: where a CPU has no VNNI, two products overflow
        steps = (weight / scale).round()
        weight.copy_(steps * scale)
        tensors |= {name: steps.to(torch.int8), f"{name}_scale": scale}
    model.save_pretrained(base)
    model.config.save_pretrained(packed)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, packed / "model.safetensors")
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel"},
        "input_activations": number | {"strategy": "token", "dynamic": True},
    }
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    file = packed / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))


def int8_case(folder: Path) -> Case:
    """A mixture on a base in eight bits."""

    def quantise(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.__class__ = Int8Linear

    base = tiny_base("llama", folder / "base")
    int8(base, folder / "packed")
    adapter = str(folder / "adapter")
    config = every_kind(False, router=moa.Router(input="attention"))
    perturb(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)).save_pretrained(adapter)
    prompts = random_prompts(97, 6)
    return Case(str(folder / "packed"), adapter, prompts, answers_of(str(base), adapter, prompts, prepare=quantise))


def trained_case(name: str, config: moa.MoAConfig, folder: Path, number: int, **training: int) -> Case:
    base = models.find(name).place
    adapter = trained(base, config, folder, **training)
    prompts = questions(AutoTokenizer.from_pretrained(base), number)
    return Case(base, adapter, prompts, answers_of(base, adapter, prompts))


def soft() -> moa.MoAConfig:
    return moa.preset("soft-moa", router={"input": "attention"})


def base_case(name: str, number: int) -> Case:
    base = models.find(name).place
    prompts = questions(AutoTokenizer.from_pretrained(base), number)
    return Case(base, "", prompts, answers_of(base, None, prompts))


TRAINED: dict[str, Callable[[Path], Case]] = {
    "int8": int8_case,
    "base": lambda folder: base_case("embedded", 16),
    "soft": lambda folder: trained_case("embedded", soft(), folder, 64, steps=20, rows=8),
    "early": lambda folder: trained_case("embedded", soft(), folder, 8, steps=10, rows=8),
    "earlier": lambda folder: trained_case("embedded", soft(), folder, 8, steps=5, rows=8),
    "sparse": lambda folder: trained_case("embedded", moa.preset("sparse-moa"), folder, 16, steps=20, rows=8),
    "smollm2": lambda folder: trained_case("smollm2", soft(), folder, 16, steps=6, rows=4),
}


@pytest.fixture(scope="module")
def cases(request: Any, tmp_path_factory: Any) -> dict[str, Case]:
    """Those that the chosen tests ask for with the mark ``case``, all of them before any engine starts."""
    asked = [mark.args[0] for item in request.session.items for mark in item.iter_markers("case")]
    found = {}
    for name in dict.fromkeys(asked):
        folder = tmp_path_factory.mktemp(name)
        with suppress(FileNotFoundError):  # SmolLM2 need not be on this machine
            found[name] = TRAINED[name](folder) if name in TRAINED else tiny_case(name, folder)
    return found


def with_case(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.case(name)) for name in names]


# --- what vLLM says ---------------------------------------------------------------------------------------------------


@contextmanager
def engine(base: str, adapters: dict[str, str], **settings: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if settings.get("tensor_parallel_size", 1) > 1:  # on however few cores; `apply_model` sends functions to processes
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    overrides = {"architectures": ["MoAForCausalLM"], "moa_adapters": adapters}
    common: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 64, "skip_tokenizer_init": True, "max_model_len": 512}
    common |= {"hf_overrides": overrides, "enforce_eager": True}
    llm = LLM(base, **(common | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm: Any, prompts: list[list[int]], new: int = NEW, **options: Any) -> list[Answer]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **options)
    return [
        Answer(list(o.outputs[0].token_ids), [next(iter(step.values())).logprob for step in o.outputs[0].logprobs])
        for o in outputs
    ]


def check(given: list[Answer], expected: list[Answer], close: float = CLOSE) -> None:
    equal = sum(a.tokens == b.tokens for a, b in zip(given, expected, strict=True))
    assert equal == len(expected), f"{equal} of {len(expected)} answers are equal"
    pairs = zip(given, expected, strict=True)
    off = max(abs(x - y) for a, b in pairs for x, y in zip(a.log_probabilities, b.log_probabilities, strict=True))
    assert off < close
    print(f"{len(expected)} answers equal, log-probabilities within {off:.1e}")


@pytest.mark.parametrize("family", with_case(*FAMILIES))
def test_families(cases, family):
    """A batch of mixed lengths; every kind of expert and copies, the router before the block or before attention."""
    case = cases[family]
    with engine(case.base, {"tiny": case.adapter}, max_model_len=128) as llm:
        check(ask(llm, case.prompts), case.answers, CLOSE_AT_RANDOM)


@pytest.mark.parametrize("name", with_case("soft", "sparse"))
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_chunked_prefill": True}, {"enforce_eager": False}],
    ids=["eager", "chunks", "compiled"],
)
def test_trained_mixtures(cases, name, settings):
    case = cases[name]
    with engine(case.base, {name: case.adapter}, **settings) as llm:
        check(ask(llm, case.prompts), case.answers)


def split(*names: str, **settings: Any) -> list[Any]:
    """Cases for an engine of two processes."""
    settings["tensor_parallel_size"] = 2
    how = "eager" if settings.get("enforce_eager", True) else "compiled"
    return [pytest.param(name, settings, marks=pytest.mark.case(name), id=f"{name}-{how}") for name in names]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *split(*[family for family in FAMILIES if family not in NOT_SPLIT], max_model_len=128),
        *split("llama", "mixtral", max_model_len=128, enforce_eager=False),
        *split("soft", "sparse", max_num_batched_tokens=64, max_num_seqs=8, enable_chunked_prefill=True),
    ],
)
def test_two_processes_share_a_model(cases, name, settings):
    """Tensor parallelism, with every kind of expert and copies; one KV head in both processes among the families."""
    case = cases[name]
    with engine(case.base, {name: case.adapter}, **settings) as llm:
        compiled = bool(llm.llm_engine.vllm_config.compilation_config.mode)
        assert compiled is not settings.get("enforce_eager", True)
        check(ask(llm, case.prompts[:16]), case.answers[:16], CLOSE_AT_RANDOM)


WAYS = [
    pytest.param(True, 1, id="eager"),
    pytest.param(False, 1, id="compiled"),
    pytest.param(True, 2, id="two-processes"),
]


@pytest.mark.case("base")
@pytest.mark.case("soft")
@pytest.mark.case("sparse")
@pytest.mark.case("llama")
@pytest.mark.parametrize(("eager", "processes"), [*WAYS, pytest.param(False, 2, id="two-processes-compiled")])
def test_two_mixtures_and_the_base_in_one_batch(cases, eager, processes):
    """Chosen per request; a common prefix is cached for each of them apart."""
    from vllm.lora.request import LoRARequest

    soft, sparse = cases["soft"], cases["sparse"]
    folders = {"soft": soft.adapter, "sparse": sparse.adapter}
    settings = {"enable_lora": True, "max_loras": 2, "worker_cls": WORKER, "enable_prefix_caching": True}
    settings |= {"enforce_eager": eager, "tensor_parallel_size": processes}
    with engine(soft.base, folders, **settings) as llm:
        requests = [LoRARequest(name, number, folder) for number, (name, folder) in enumerate(folders.items(), 1)]
        mixed = [request for _ in range(16) for request in (*requests, None)]
        prompts = [soft.prompts[row] for row in range(16) for _ in range(3)]
        answers = ask(llm, prompts, lora_request=mixed)
        check(answers[0::3], soft.answers[:16])
        check(answers[1::3], sparse.answers[:16])
        check(answers[2::3], cases["base"].answers[:16])
        with pytest.raises(REFUSED, match="a running engine cannot change its shapes"):
            llm.llm_engine.add_lora(LoRARequest("third", 3, cases["llama"].adapter))


@pytest.mark.case("soft")
@pytest.mark.case("early")
@pytest.mark.case("earlier")
@pytest.mark.parametrize(("eager", "processes"), WAYS)
def test_mixtures_come_and_go_while_it_runs(cases, eager, processes):
    """Two slots, three mixtures, new weights of one, prefix cache on: the answers are those of the weights named."""
    from vllm.lora.request import LoRARequest

    soft, early, earlier = (cases[name] for name in ("soft", "early", "earlier"))
    prompts = early.prompts
    settings = {"enable_lora": True, "max_loras": 2, "worker_cls": WORKER, "enable_prefix_caching": True}
    settings |= {"enforce_eager": eager, "tensor_parallel_size": processes}
    with engine(soft.base, {"soft": soft.adapter}, **settings) as llm:
        running = llm.llm_engine
        assert bool(running.vllm_config.compilation_config.mode) is not eager
        mine = LoRARequest("soft", 1, soft.adapter)
        check(ask(llm, prompts, lora_request=mine), soft.answers[: len(prompts)])
        second, third = LoRARequest("early", 2, early.adapter), LoRARequest("earlier", 3, earlier.adapter)
        assert running.add_lora(second)
        check(ask(llm, prompts, lora_request=second), early.answers)
        mixed = ask(llm, [p for p in prompts for _ in range(2)], lora_request=[third, mine] * len(prompts))
        check(mixed[0::2], earlier.answers)
        check(mixed[1::2], soft.answers[: len(prompts)])
        check(ask(llm, prompts, lora_request=second), early.answers)

        again = LoRARequest("soft", 1, earlier.adapter, load_inplace=True)
        assert running.add_lora(again)
        check(ask(llm, prompts, lora_request=again), earlier.answers)
        assert running.remove_lora(2)
        assert running.list_loras() == {1, 3}
        with pytest.raises(REFUSED, match="or got others since"):
            running.add_lora(LoRARequest("soft", 1, soft.adapter, load_inplace=True))


@pytest.mark.case("soft")
def test_the_prefix_cache(cases):
    """More than 512 tokens in common: computed once, and the answers stay what they are."""
    case = cases["soft"]
    common = [token for prompt in case.prompts for token in prompt][:600]
    prompts = [common + case.prompts[row] for row in range(3)]
    settings = {"max_model_len": 1024, "enable_prefix_caching": True}
    with engine(case.base, {"soft": case.adapter}, **settings) as llm:
        fresh = [ask(llm, [prompt])[0] for prompt in prompts if llm.reset_prefix_cache()]
        check([*ask(llm, prompts[:1]), *ask(llm, prompts[1:])], fresh)
        assert fresh != ask(llm, case.prompts[:3])


def load(tensors: dict[str, torch.Tensor], model: Any) -> None:
    model.load_weights(tensors.items())


def hand_over(llm: Any, tensors: dict[str, torch.Tensor]) -> None:
    """New weights for the model in every process; what is sent there has to be found there by its name."""
    llm.apply_model(functools.partial(load, tensors))


@pytest.mark.case("soft")
@pytest.mark.parametrize("processes", [1, 2])
def test_new_weights_in_place(cases, processes):
    """As in reinforcement learning: the engine goes on with what a trainer hands over."""
    soft = cases["soft"]
    tensors = load_file(Path(soft.adapter, "adapter_model.safetensors"))
    settings = {"enable_prefix_caching": False, "tensor_parallel_size": processes}
    with engine(soft.base, {"soft": soft.adapter}, **settings) as llm:
        hand_over(llm, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
        silent = ask(llm, soft.prompts[:8])
        assert [a.tokens for a in silent] != [a.tokens for a in soft.answers[:8]]
        hand_over(llm, tensors)
        check(ask(llm, soft.prompts[:8]), soft.answers[:8])
        wrong = {"base_model.model.model.layers.0.mixture.moa_w9.weight": torch.zeros(1)}
        with pytest.raises(REFUSED, match="missing"):
            hand_over(llm, wrong)


@pytest.mark.case("int8")
def test_a_quantised_base(cases):
    """Weights and activations of eight bits, the only ones that vLLM multiplies on every CPU."""
    case = cases["int8"]
    with engine(case.base, {"tiny": case.adapter}, max_model_len=128) as llm:
        check(
            ask(llm, case.prompts), case.answers, close=2e-2
        )  # where rounding falls the other way, a step is a hundredth


@pytest.mark.case("smollm2")
def test_a_pretrained_base(cases):
    if "smollm2" not in cases:
        pytest.skip("SmolLM2 is not on this machine")
    case = cases["smollm2"]
    with engine(case.base, {"bookings": case.adapter}) as llm:
        check(ask(llm, case.prompts), case.answers)


@pytest.mark.case("llama")
@pytest.mark.case("soft")
def test_an_adapter_of_another_base_is_refused(cases):
    with (
        pytest.raises(ValueError, match="another base model or configuration"),
        engine(cases["llama"].base, {"soft": cases["soft"].adapter}, max_model_len=128),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "mixtures", "message"),
    [
        ({"pipeline_parallel_size": 2}, 1, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, 1, "decode_context_parallel_size=2"),
        ({"prefill_context_parallel_size": 2}, 1, "prefill_context_parallel_size=2"),
        ({"lora_config": object()}, 1, "--enable-lora needs --worker-cls"),
        ({"speculative_config": object()}, 1, "--speculative-config"),
        ({}, 2, "2 mixtures in one engine need --enable-lora"),
    ],
)
def test_settings_that_do_not_go_with_mixtures(changes, mixtures, message):
    from moa.serving.vllm import refuse_engine

    sizes = dict.fromkeys((f"{way}_parallel_size" for way in ("pipeline", "decode_context", "prefill_context")), 1)
    parallel = sizes | {"worker_cls": "auto"} | changes
    others = {"lora_config": None, "speculative_config": None} | changes
    with pytest.raises(ValueError, match=message):
        refuse_engine(SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **others), mixtures)


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("RowParallelLinear", {"reduce_results": False}, "shared.down, of which every process puts out a summand"),
        (
            "ColumnParallelLinear",
            {"output_size": 8, "tp_rank": 0, "tp_size": 2, "output_size_per_partition": 5},
            "shared.down, which is split as ColumnParallelLinear does",
        ),
    ],
)
def test_hosts_that_are_split_in_a_way_that_experts_do_not_follow(kind, attributes, message):
    from vllm.model_executor.layers import linear

    from moa.serving.vllm_parallel import share_of

    host = object.__new__(getattr(linear, kind))  # to be built, it needs an engine
    vars(host).update(attributes, prefix="shared.down")
    with pytest.raises(ValueError, match=message):
        share_of(host)


def test_what_slots_have_room_for():
    from moa.serving.vllm import slots_for

    soft, sparse = moa.preset("soft-moa"), moa.preset("sparse-moa")
    assert [config.to_dict() for config in slots_for([soft, soft], 3)] == [soft.to_dict()] * 3
    assert slots_for([soft, sparse], 2) == [soft, sparse]
    with pytest.raises(ValueError, match="--max-loras 3: mixtures that differ in experts, router or gating"):
        slots_for([soft, sparse], 3)


@pytest.mark.case("soft")
@pytest.mark.parametrize("processes", [1, 2])
def test_an_openai_client_gets_what_moa_generate_writes(cases, tmp_path, processes):
    case = cases["soft"]
    (Path(case.adapter) / "recipe.yaml").write_text("data: {train: ['tasks:bookings'], template: short}\n")
    question = str(prompt_of(TASKS["bookings"].generate("test", 1)[0], "none"))
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "moa"]
    base = ["--base", "embedded"]
    written = subprocess.run(
        [*command, "generate", case.adapter, question, *base, "--dtype", "float32", "--max-new-tokens", "24"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    arguments = [f"mine={case.adapter}", *base, "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    arguments += ["--tensor-parallel-size", str(processes)]
    with log.open("w") as out:
        server = subprocess.Popen([*command, "serve", *arguments], stdout=out, stderr=out, env=environment)
    try:
        answer = chat(port, "mine", question, server, log)
    finally:
        server.terminate()
        server.wait(60)
    assert answer.strip() == written
    assert "serving mine" in log.read_text()


def chat(port: int, model: str, question: str, server: subprocess.Popen[bytes], log: Path) -> str:
    """One question by OpenAI's client, as soon as the server is up."""
    from openai import OpenAI

    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            break
        except OSError:
            time.sleep(1)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
    return str(reply.choices[0].message.content)
