"""TRL's trainers take a `MoAConfig` where they take a `LoraConfig`."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import adapter_tensors, is_adapter, logits, tiny_config, tiny_llama, tiny_tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import moa

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
}
TEXTS = Dataset.from_dict({"text": ["one and one is two", "two and two is four", "a b c", "nothing at all"]})
PAIRS = Dataset.from_dict({"prompt": ["1+1=", "2+2="] * 2, "chosen": ["2", "4"] * 2, "rejected": ["3", "5"] * 2})


def fine_tune(folder, config, **options):
    arguments = SFTConfig(str(folder), **OPTIONS, **options)
    trainer = SFTTrainer(
        tiny_llama(), arguments, train_dataset=TEXTS, processing_class=tiny_tokenizer(), peft_config=config
    )
    before = adapter_tensors(trainer.model)
    trainer.train()
    return trainer, before


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [True, False])
def test_supervised_fine_tuning_trains_the_mixture_and_only_it(reentrant, tmp_path):
    config = tiny_config()
    trainer, before = fine_tune(tmp_path, config, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert len(losses(trainer)) == 2
    # What comes behind something that starts at zero moves from the second step on.
    assert not [name for name, now in adapter_tensors(trainer.model).items() if torch.equal(before[name], now)]
    base = tiny_llama().state_dict()
    kept = {name: t for name, t in trainer.model.get_base_model().state_dict().items() if not is_adapter(name)}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], t) for name, t in base.items())
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_auxiliary_loss_acts_in_training_and_leaves_the_reported_loss_alone(reentrant, tmp_path):
    """TRL recomputes the loss from the logits, so a term added to the model's own loss would be lost."""

    def run(z_loss):
        config = tiny_config(gating=moa.Threshold(z_loss=z_loss))
        checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        # The update follows the sign of Adam's gradient; plain SGD shows its size.
        trainer, before = fine_tune(tmp_path, config, optim="sgd", max_grad_norm=0.0, **checkpointing)
        name = "base_model.model.model.layers.0.mixture.moa_w2.default.bias"
        return losses(trainer)[0], adapter_tensors(trainer.model)[name] - before[name]

    plain_loss, plain = run(0.0)
    loss, pushed = run(1.0)
    assert loss == plain_loss
    assert not torch.allclose(pushed, plain, atol=1e-3)


def test_preference_optimisation_takes_the_disabled_adapter_as_its_reference(tmp_path):
    trainer = DPOTrainer(
        tiny_llama(),
        args=DPOConfig(str(tmp_path), **OPTIONS),
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer(),
        peft_config=tiny_config(),
    )
    assert trainer.ref_model is None
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are the same
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(second["rewards/margins"]) > 1e-4
    assert second["loss"] < first["loss"]
