"""What `log_router` writes into a trainer's log, against gates recorded independently."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from tiny import perturb, tiny_llama, tiny_moa, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

import moa
from moa.integrations import log_router
from moa.training.recipe import Recipe
from moa.training.sft import train

CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


class Rows(torch.utils.data.Dataset):
    """Eight rows of eight tokens; the last three of each are its answer, except where ``answers`` is False."""

    def __init__(self, answers=True):
        self.ids, self.answers = tokens(8, 8), answers

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        row = {"input_ids": self.ids[index], "attention_mask": torch.ones(8, dtype=torch.long)}
        return row | {"labels": self.labels[index]}

    @property
    def labels(self):
        labels = self.ids.clone()
        if self.answers:
            labels[:, :5] = -100
        return labels


class Tracker(TrainerCallback):
    """Sees what an experiment tracker sees."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def model_of(**fields):
    experts = [moa.LoraExpert(targets=["q"], r=2, gate="lora"), moa.PromptExpert(length=3), moa.ParallelExpert(size=4)]
    model = get_peft_model(tiny_llama(), moa.MoAConfig(experts=experts, **fields))
    return perturb(model)


def fit(model, folder, data=None, watched=True, trainer_class=Trainer, **settings):
    tracker = Tracker()
    fields = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0, "logging_steps": 1}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **(fields | settings))
    trainer = trainer_class(model=model, args=arguments, train_dataset=data or Rows(), callbacks=[tracker])
    if watched:
        log_router(trainer)
    trainer.train()
    return trainer, tracker.seen


def recorded(model, data):
    """Gates (blocks, answer tokens, experts) of one forward."""
    with torch.no_grad(), moa.gate_values(model) as record:
        model(input_ids=data.ids)
    return torch.stack([record.gates[block][data.labels != -100] for block in sorted(record.gates)]), record


def test_figures_are_those_of_the_answers(tmp_path):
    model, data = model_of(), Rows()
    gates, record = recorded(model, data)
    trainer, seen = fit(model, tmp_path)
    logged = seen[0]
    loads = gates.mean(1) / gates.mean(1).sum(-1, keepdim=True) * 3
    shares = gates / gates.sum(-1, keepdim=True)
    entropy = -(shares * shares.log()).sum(-1).mean() / torch.tensor(3.0).log()
    assert logged["router/utilisation_min"] == pytest.approx(float(loads.min()), rel=1e-3)
    assert logged["router/utilisation_max"] == pytest.approx(float(loads.max()), rel=1e-3)
    assert logged["router/gate"] == pytest.approx(float(gates.mean()), rel=1e-3)
    assert logged["router/entropy"] == pytest.approx(float(entropy), rel=1e-3)
    assert logged["router/dead"] == 0
    for place, name in enumerate(record.columns[0]):
        assert logged[f"router/utilisation/{name}"] == pytest.approx(float(loads[:, place].mean()), rel=1e-3)
    assert "router/threshold" not in logged
    assert trainer.state.log_history[0]["router/entropy"] == logged["router/entropy"]


def test_prompts_would_give_other_figures(tmp_path):
    _, answers = fit(model_of(), tmp_path)
    _, everything = fit(model_of(), tmp_path, Rows(answers=False))
    assert answers[0]["router/gate"] != everything[0]["router/gate"]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"label_smoothing_factor": 0.1},
    ],
    ids=["checkpointing", "reentrant", "accumulation", "loss computed outside of the model"],
)
def test_figures_do_not_depend_on_how_a_step_is_computed(tmp_path, settings):
    settings = {key.replace("gradient_checkpointing", CHECKPOINTING): value for key, value in settings.items()}
    _, plain = fit(model_of(), tmp_path)
    _, other = fit(model_of(), tmp_path, **settings)
    figures = [{k: v for k, v in logs[0].items() if k.startswith("router/")} for logs in (plain, other)]
    assert figures[0] == pytest.approx(figures[1], abs=2e-4)


def test_threshold_copies_and_dead_experts_are_seen(tmp_path):
    _, seen = fit(tiny_moa(), tmp_path)
    assert 0 < seen[0]["router/threshold"] < 1
    closed = get_peft_model(tiny_llama(), moa.preset("soft-moa", router=moa.Router(initial_logit=-10.0)))
    _, seen = fit(closed, tmp_path)
    assert seen[0]["router/dead"] == 1
    _, seen = fit(get_peft_model(tiny_llama(), moa.preset("molora")), tmp_path)
    assert seen[0]["router/gate"] == pytest.approx(1 / 8)  # of eight copies under a softmax
    assert 0 < seen[0]["router/utilisation_min"] < 1 < seen[0]["router/utilisation_max"]


def test_training_is_not_changed_and_nothing_stays_behind(tmp_path):
    weights = []
    for watched in (False, True):
        model = model_of()
        _, seen = fit(model, tmp_path, watched=watched, learning_rate=1e-2, max_steps=3, eval_strategy="no")
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert [("router/gate" in logs) for logs in seen if "loss" in logs] == [watched] * 3
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_compiled_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile=True"):
        fit(model_of(), tmp_path, torch_compile=True)


def test_a_model_without_a_mixture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no Mixture of Adapters"):
        fit(tiny_llama(), tmp_path)


def test_moa_train_logs_the_routers(tiny_base, tiny_rows, tmp_path):
    fields = {"batch_size": 4, "max_steps": 2, "log_steps": 1, "data": {"train": [str(tiny_rows)]}}
    train(Recipe(base=str(tiny_base), output=str(tmp_path / "moa"), adapter={"preset": "sparse-moa"}, **fields))
    log = [json.loads(line) for line in (tmp_path / "moa" / "training_log.jsonl").read_text().splitlines()]
    assert {"router/utilisation_max", "router/threshold", "router/dead"} <= log[0].keys()
    train(Recipe(base=str(tiny_base), output=str(tmp_path / "lora"), adapter={"preset": "peft:lora"}, **fields))
    assert "router/" not in (tmp_path / "lora" / "training_log.jsonl").read_text()
