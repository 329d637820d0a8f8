"""Two processes on gloo: DDP and FSDP2 give the gradients of one process; what is split too early is refused."""

import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model, get_peft_model_state_dict
from tiny import adapter_tensors, perturb, tiny_config, tiny_llama, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import moa

pytestmark = pytest.mark.slow

KINDS = ["ddp", "fsdp2"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINTING = {"plain": None, "reentrant": True, "not reentrant": False}
LATE = {"tensor parallel": "tp_size=2", "fsdp2": "Attach the adapter first"}
VARIANTS = [(kind, dtype, checkpointing) for kind in KINDS for dtype in DTYPES for checkpointing in CHECKPOINTING]


def build(dtype, checkpointing):
    """The same model in every process: all experts, a learned threshold and a load-balance loss."""
    config = tiny_config(gating=moa.Threshold(balance=0.1), router=moa.Router(level="instance"))
    model = perturb(get_peft_model(tiny_llama().to(DTYPES[dtype]), config)).train()
    if CHECKPOINTING[checkpointing] is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
        model.enable_input_require_grads()
    return model


def backward(model, rows):
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run_variant(rank, kind, dtype, checkpointing):
    """Gradients, and for FSDP2 the gathered adapter, on rank 0."""
    model = build(dtype, checkpointing)
    wrapped = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
    backward(wrapped, tokens()[rank : rank + 1])
    result = {"gradients": {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}}
    if kind == "fsdp2":
        blocks = model.get_base_model().model.layers
        result["sharded"] = all(hasattr(p, "full_tensor") for p in blocks.parameters())
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        result["adapter"] = get_peft_model_state_dict(model, state_dict=state)
    return result


def attach_late(rank, folder, engine):
    """What is said to an adapter that comes after the base was split."""
    if engine == "tensor parallel":
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        base = LlamaForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto")
    else:
        base = tiny_llama()
        fully_shard(base)
    try:
        get_peft_model(base, tiny_config())
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "nothing"}


def work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for variant in VARIANTS:
        try:
            results[variant] = run_variant(rank, *variant)
        except Exception:
            results[variant] = traceback.format_exc()
    for engine in LATE:
        try:
            results[engine] = attach_late(rank, folder, engine)
        except Exception:
            results[engine] = traceback.format_exc()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All variants in one pair of processes: starting them takes longer than running them."""
    folder = tmp_path_factory.mktemp("distributed")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tiny_llama().save_pretrained(folder / "base")
    mp.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "results.pt")


def outcome(results, variant):
    assert not isinstance(results[variant], str), results[variant]
    return results[variant]


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_gradients_are_those_of_one_process(results, variant):
    _, dtype, checkpointing = variant
    model = build(dtype, checkpointing)
    for row in tokens().split(1):
        backward(model, row)
    found = outcome(results, variant)["gradients"]
    expected = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == adapter_tensors(model).keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("engine", LATE)
def test_an_adapter_on_a_base_that_is_split_already_is_refused(results, engine):
    assert LATE[engine] in outcome(results, engine)["said"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sharded_adapter_gathers_to_full_tensors(results, dtype):
    result = outcome(results, ("fsdp2", dtype, "plain"))
    assert result["sharded"]
    expected = get_peft_model_state_dict(build(dtype, "plain"))
    assert result["adapter"].keys() == expected.keys()
    assert all(torch.equal(result["adapter"][name], t) for name, t in expected.items())
    assert {t.dtype for t in result["adapter"].values()} == {torch.float32}
