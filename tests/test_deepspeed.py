"""Two processes of DeepSpeed under transformers' Trainer: the adapter they save is that of one process.

DeepSpeed has an environment of its own: `make distributed`.
"""

from __future__ import annotations

import os
import socket
import traceback
from importlib.util import find_spec

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import logits, perturb, tiny_config, tiny_llama, tokens
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import moa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make distributed"),
    pytest.mark.filterwarnings("default"),
]

CONFIGS = {
    "every expert": {},
    "instance": {"router": moa.Router(level="instance"), "gating": "soft"},
}
STAGES = {"zero2": 2, "zero3": 3, "zero3 checkpointing": 3}
ROWS = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]


def arguments(folder, processes, stage, checkpointing):
    """The same global batch of four rows in any number of processes."""
    deepspeed = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4 // processes,
        optim="sgd",  # Adam makes large steps of the rounding in gradients that are next to zero
        learning_rate=0.02,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        deepspeed=deepspeed if stage else None,
    )


def train(base, output, config, processes, stage, checkpointing):
    args = arguments(output, processes, stage, checkpointing)  # before the model, which stage 3 splits as it is loaded
    model = LlamaForCausalLM.from_pretrained(base)
    split = all(hasattr(p, "ds_shape") and p.numel() <= (p.ds_shape.numel() + 1) // 2 for p in model.parameters())
    model = get_peft_model(model, tiny_config(**CONFIGS[config]))
    perturb_in_place(model)
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train()
    trainer.save_model(str(output))
    return split, type(trainer.model_wrapped).__name__


def perturb_in_place(model):
    """As `perturb`, also where parameters are split."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        import deepspeed

        own = [p for p in model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
            perturb(model)
    else:
        perturb(model)


def work(rank, folder, port, cases):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_SIZE": "2"}
    torch.set_num_threads(1)
    results = {}
    for stage, config in cases:
        output = f"{folder}/{stage} {config}"
        try:
            results[stage, config] = train(f"{folder}/base", output, config, 2, STAGES[stage], "checkpointing" in stage)
        except Exception:
            results[stage, config] = traceback.format_exc()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every case in one pair of processes."""
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_llama().save_pretrained(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (str(folder), port, [(stage, config) for stage in STAGES for config in CONFIGS]), nprocs=2)
    return folder


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_adapter_is_that_of_one_process(folder, tmp_path, stage, config):
    result = torch.load(folder / "results.pt")[stage, config]
    assert not isinstance(result, str), result
    split, wrapped = result
    assert wrapped == "DeepSpeedEngine"
    assert split == (STAGES[stage] == 3)
    train(folder / "base", tmp_path, config, 1, None, False)
    found = load_file(folder / f"{stage} {config}" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "adapter_model.safetensors")
    before = get_peft_model_state_dict(perturb(get_peft_model(tiny_llama(), tiny_config(**CONFIGS[config]))))
    assert found.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        assert not torch.equal(before[name], tensor), name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    again = PeftModel.from_pretrained(tiny_llama(), folder / f"{stage} {config}")
    assert torch.allclose(logits(again), logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), atol=1e-3)
