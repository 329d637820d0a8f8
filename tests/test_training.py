"""Training on TRL: what is learned from, what is saved, and that an interruption changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationMixin, TrainerCallback
from trl import SFTTrainer
from typer.testing import CliRunner

from moa.cli import app
from moa.data import prompt_of, prompt_text, prompt_tokens
from moa.evaluation import models
from moa.settings import save
from moa.training import sft
from moa.training.base import load_adapter, load_base
from moa.training.beside import beside
from moa.training.checkpoints import WEIGHTS, WRITING, checkpoints, last_complete
from moa.training.recipe import FILE_NAME, Recipe
from moa.training.stops import Diverged, Interrupted, TrainingStopped
from moa.training.trainer import Trainer

STEPS = 7  # of five to an epoch, so that resuming crosses from one epoch into the next

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def recipe(tiny_base, tiny_rows, tmp_path) -> Recipe:
    return make_recipe(tiny_base, tiny_rows, tmp_path / "run")


def make_recipe(base: Path, rows: Path, output: Path, **changes: object) -> Recipe:
    """Dropout, accumulation and data order are all on, so that a lost random state would show."""
    fields: dict[str, object] = {
        "base": str(base),
        "adapter": {"preset": "soft-moa", "r": 2, "size": 2, "length": 2, "dropout": 0.2},
        "data": {"train": [str(rows)], "template": "short", "max_length": 64},
        "output": str(output),
        "max_steps": STEPS,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "dtype": "float32",
        "save_steps": 2,
        "log_steps": 1,
    }
    return Recipe(**(fields | changes))


@pytest.fixture(scope="module")
def unbroken(tiny_base, tiny_rows, tmp_path_factory) -> Path:
    return sft.train(make_recipe(tiny_base, tiny_rows, tmp_path_factory.mktemp("unbroken") / "run"))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class At(TrainerCallback):
    """Calls ``action`` at the beginning of one step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def with_callback(monkeypatch, callback: TrainerCallback) -> None:
    original = sft._trainer
    monkeypatch.setattr(sft, "_trainer", lambda *args: (t := original(*args), t.add_callback(callback))[0])


def test_the_folder_of_a_run_is_complete(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        *("adapter_config.json", WEIGHTS, "README.md", "recipe.yaml", "training_log.jsonl", "progress.json"),
        *("checkpoint-6", "checkpoint-7"),
    }
    assert Recipe.load(unbroken / "recipe.yaml").output == str(unbroken)
    log = [json.loads(line) for line in (unbroken / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [*range(1, STEPS + 1)]
    assert log[STEPS - 1]["loss"] < log[0]["loss"]
    card = (unbroken / "README.md").read_text()
    assert "library_name: peft" in card
    assert "pip install moa-lm" in card
    assert re.search(r"^q +█* +\d\.\d\d$", card, re.MULTILINE)
    assert not list(unbroken.rglob("*.bin"))


def test_the_adapter_loads_with_peft_and_with_moa(unbroken, tiny_base):
    tokens = torch.arange(3, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    plain = base(tokens).logits
    theirs = PeftModel.from_pretrained(base, unbroken)(tokens).logits
    ours = load_adapter(load_base(str(tiny_base), "float32")[0], unbroken)(tokens).logits
    assert torch.equal(theirs, ours)
    assert not torch.allclose(theirs, plain)


def test_only_answers_are_learned(recipe, tiny_rows, monkeypatch):
    seen = []
    original = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer,
        "compute_loss",
        lambda self, model, inputs, *a, **k: (seen.append(dict(inputs)), original(self, model, inputs, *a, **k))[1],
    )
    recipe.max_steps = 1
    sft.train(recipe)
    _, tokenizer = load_base(recipe.base)
    answers = {f" {json.loads(line)['output']}</s>" for line in tiny_rows.read_text().splitlines()}
    for batch in seen:
        for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = tokenizer.decode(tokens[tokens != tokenizer.pad_token_id])
            learned = tokenizer.decode(labels[labels != -100])
            assert learned in answers
            assert text.endswith("### Response:" + learned)


def test_the_loss_from_answers_alone_is_the_loss_of_trl(recipe, monkeypatch):
    pairs = []
    ours = Trainer.compute_loss

    def both(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = []
        for compute in (SFTTrainer.compute_loss, ours):
            loss = compute(self, model, dict(inputs), False, num_items_in_batch)
            found.append([loss, *torch.autograd.grad(loss, trained, retain_graph=True)])
        pairs.append(found)
        return found[-1][0]

    monkeypatch.setattr(Trainer, "compute_loss", both)
    recipe.adapter["dropout"] = 0.0
    recipe.max_steps = 3
    sft.train(recipe)
    assert len(pairs) == 3 * recipe.gradient_accumulation_steps
    for theirs, mine in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in pairs[-1][0][1:])


def test_a_batch_without_any_answer_has_loss_zero(recipe, monkeypatch):
    losses = []
    ours = Trainer.compute_loss

    def silenced(self, model, inputs, *rest, **keys):
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        losses.append(ours(self, model, inputs, num_items_in_batch=torch.tensor(0)))
        return losses[-1]

    monkeypatch.setattr(Trainer, "compute_loss", silenced)
    recipe.max_steps = 1
    sft.train(recipe)
    assert [loss.item() for loss in losses] == [0.0] * recipe.gradient_accumulation_steps


def test_vectors_and_biases_have_no_weight_decay(recipe, monkeypatch):
    groups = []
    original = Trainer.create_optimizer
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, *a: (groups.append(self), original(self, *a))[1])
    recipe.max_steps = 1
    sft.train(recipe)
    decayed = groups[0].get_decay_parameter_names(groups[0].model)
    assert any("moa_A" in name or "moa_a" in name for name in decayed)
    assert not any("head_gate" in name or "bias" in name for name in decayed)


def train_and_die(moment: str, recipe: Path) -> None:
    """In a process of its own, which it kills."""
    if moment == "in a step":
        step = Trainer.training_step
        Trainer.training_step = lambda self, *a, **k: die() if self.state.global_step == 5 else step(self, *a, **k)
    else:
        write = torch.save

        def cut(value, path, *a, **k):
            write(value, path, *a, **k)
            if "checkpoint-4" in str(path):
                os.truncate(path, 10)
                die()

        torch.save = cut
    sft.train(Recipe.load(recipe))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "left"), [("in a step", 4), ("in a checkpoint", 2)])
def test_a_killed_run_resumes_to_the_same_weights(moment, left, unbroken, recipe, tmp_path):
    save(recipe, tmp_path / FILE_NAME)
    process = warm.started(train_and_die, moment, tmp_path / FILE_NAME, log=tmp_path / "log")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    output = Path(recipe.output)
    assert not (output / WEIGHTS).exists()
    assert last_complete(output) == output / f"checkpoint-{left}"
    sft.train(recipe, resume=True)
    assert not (output / WRITING).exists()
    assert_same_weights(output, unbroken)
    steps = [json.loads(line)["step"] for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, STEPS + 1)]


def test_ctrl_c_saves_and_resumes_to_the_same_weights(unbroken, recipe, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        with_callback(patch, At(2, lambda: signal.raise_signal(signal.SIGINT)))
        with pytest.raises(Interrupted, match=r"stopped after step 3 of 7.*--resume"):
            sft.train(recipe)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in checkpoints(Path(recipe.output))] == ["checkpoint-2", "checkpoint-3"]
    sft.train(recipe, resume=True)
    assert_same_weights(Path(recipe.output), unbroken)


def test_a_damaged_checkpoint_is_passed_over(unbroken, recipe):
    output = Path(recipe.output)
    shutil.copytree(unbroken, output)
    for checkpoint in ("checkpoint-7", "checkpoint-6"):
        assert last_complete(output) == output / checkpoint
        weights = output / checkpoint / WEIGHTS
        os.truncate(weights, weights.stat().st_size - 8)
    assert last_complete(output) is None
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete"):
        sft.train(recipe, resume=True)


def test_checkpoints_that_were_deleted_are_not_trained_again(unbroken, recipe):
    shutil.copytree(unbroken, recipe.output)
    for checkpoint in checkpoints(Path(recipe.output)):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="finished and its checkpoints are gone"):
        sft.train(recipe, resume=True)
    assert_same_weights(Path(recipe.output), unbroken)


def test_a_run_that_was_killed_before_it_deleted_old_checkpoints_does_so_later(unbroken, recipe):
    output = Path(recipe.output)
    shutil.copytree(unbroken, output)
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-4")
    sft.train(recipe, resume=True)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-6", "checkpoint-7"]
    assert_same_weights(output, unbroken)


def test_resuming_a_finished_run_changes_nothing(unbroken, recipe):
    shutil.copytree(unbroken, recipe.output)
    sft.train(recipe, resume=True)
    assert_same_weights(Path(recipe.output), unbroken)


def test_a_run_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(recipe, monkeypatch):
    def poison():
        for name, parameter in trainers[0].model.named_parameters():
            if parameter.requires_grad and "moa_up" in name:
                parameter.data.fill_(float("nan"))

    trainers = []
    original = sft._trainer
    monkeypatch.setattr(
        sft,
        "_trainer",
        lambda *args: (trainers.append(original(*args)), trainers[0].add_callback(At(3, poison)))[0] or trainers[0],
    )
    with pytest.raises(Diverged, match=r"the loss is nan at step 4 of 7.*last good checkpoint is .*checkpoint-2"):
        sft.train(recipe)
    assert last_complete(Path(recipe.output)).name == "checkpoint-2"


def test_weights_that_are_not_finite_are_not_saved(recipe, monkeypatch):
    original = Trainer.training_step

    def step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 3:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(Diverged, match=r"is not finite.*checkpoint-2"):
        sft.train(recipe)
    assert [path.name for path in checkpoints(Path(recipe.output))] == ["checkpoint-2"]


def test_resuming_on_other_data_of_the_same_name_is_refused(recipe, tmp_path, tiny_rows):
    rows = Path(shutil.copy(tiny_rows, tmp_path / "rows.jsonl"))
    recipe.data.train, recipe.max_steps = [str(rows)], 2
    sft.train(recipe)
    recipe.max_steps = 3
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(ValueError, match=r"cannot resume on other data.*checkpoint-2"):
        sft.train(recipe, resume=True)
    rows.write_text("\ufeff" + "".join(lines))  # the same rows
    sft.train(recipe, resume=True)
    assert last_complete(Path(recipe.output)).name == "checkpoint-3"


@pytest.mark.parametrize("changes", [{"max_steps": 2}, {"max_steps": None, "epochs": 0.1}])
def test_a_run_that_was_killed_after_its_last_step_takes_no_other(recipe, changes):
    recipe = replace(recipe, **changes)
    output = sft.train(recipe)
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    last = last_complete(output)
    (output / WEIGHTS).unlink()
    (output / "adapter_config.json").unlink()
    sft.train(recipe, resume=True)
    assert {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()} == before
    assert last_complete(output) == last


def test_training_may_go_on_longer_than_planned(unbroken, recipe):
    shutil.copytree(unbroken, recipe.output)
    recipe.max_steps = STEPS + 1
    sft.train(recipe, resume=True)
    assert last_complete(Path(recipe.output)).name == f"checkpoint-{STEPS + 1}"


def test_bfloat16_base_keeps_float32_adapters(recipe):
    recipe.dtype, recipe.max_steps, recipe.gradient_checkpointing = "bfloat16", 1, True
    weights = load_file(sft.train(recipe) / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_chat_messages_are_learned_through_the_chat_template(recipe, tiny_base, tiny_tokenizer, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    recipe.base, recipe.max_steps, recipe.data.train = str(folder), 1, [str(chat_rows(tmp_path))]
    run = sft.train(recipe)
    assert (run / WEIGHTS).exists()
    assert Recipe.load(run / "recipe.yaml").data.template == "chat"
    for adapter in (run, run / "checkpoint-1"):
        loaded = models.load(str(adapter))
        asked = prompt_text(loaded.tokenizer, prompt_of({"instruction": "hi"}, loaded.template))
        assert asked == "[user]hi</s>[assistant]"
    recipe.max_steps = 2
    sft.train(recipe, resume=True)


def test_the_command_line_asks_in_the_form_of_training(recipe, tiny_base, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    recipe.base, recipe.max_steps, recipe.data.train = str(folder), 1, [str(chat_rows(tmp_path))]
    run = str(sft.train(recipe))
    read = []

    def reply(self, input_ids, **kwargs):
        read.append(load_base(str(folder))[1].decode(input_ids[0]))
        return torch.cat([input_ids, torch.full_like(input_ids[:, :1], 2)], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", reply)
    for arguments, lines in [
        (["generate", run, "hi"], None),
        (["generate", run], "\ufeffhi\n\n"),
        (["generate", "-", "hi", "--base", str(folder)], None),
        (["eval", run, "--data", recipe.data.train[0]], None),
        (["eval", run, "--data", str(instructions(tmp_path))], None),
        (["inspect", run, "--data", recipe.data.train[0], "--output", str(tmp_path / "page.html")], None),
    ]:
        result = CliRunner().invoke(app, arguments, input=lines)
        assert result.exit_code == 0, result.output
        assert read == ["[user]hi</s>[assistant]"], arguments
        read.clear()
    assert CliRunner().invoke(app, ["generate", run, "hi", "--template", "none"]).exit_code == 0
    assert read == ["hi"]


def instructions(folder: Path) -> Path:
    file = folder / "instructions.jsonl"
    file.write_text(json.dumps({"instruction": "hi", "output": "ho"}) + "\n")
    return file


def test_rows_with_prompts_of_their_own_are_remembered_as_such(recipe, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n")
    recipe.max_steps, recipe.data.train = 1, [str(rows)]
    assert models.load(str(sft.train(recipe))).template == "none"


def test_an_adapter_without_a_recipe_is_asked_in_the_usual_form_with_a_note(recipe, capsys):
    recipe.max_steps = 1
    run = sft.train(recipe)
    (run / "recipe.yaml").unlink()
    capsys.readouterr()
    assert models.load(str(run)).template == "alpaca"
    assert "no recipe.yaml with the adapter" in capsys.readouterr().err


def test_what_lies_beside_an_adapter_on_the_hub_is_found(monkeypatch, tmp_path):
    recipe = make_recipe(Path("base"), Path("rows.jsonl"), tmp_path)
    save(recipe, tmp_path / FILE_NAME)
    there = SimpleNamespace(siblings=[SimpleNamespace(rfilename="recipe.yaml")])
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: there)
    monkeypatch.setattr("moa.training.beside.hf_hub_download", lambda adapter, name: str(tmp_path / name))
    assert beside("owner/adapter", "recipe.yaml") == tmp_path / "recipe.yaml"
    assert beside("owner/adapter", "spans.json") is None
    assert models._trained_with("owner/adapter") == "short"


def test_without_the_hub_what_was_fetched_before_is_found(monkeypatch, tmp_path):
    def unreachable(self, name, timeout):
        raise ConnectionError

    assert beside("owner/adapter/deeper", "recipe.yaml") is None
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    assert beside("owner/adapter", "recipe.yaml") is None
    monkeypatch.setattr("moa.training.beside.try_to_load_from_cache", lambda adapter, name: str(tmp_path / name))
    assert beside("owner/adapter", "recipe.yaml") == tmp_path / "recipe.yaml"


def test_a_template_that_the_base_lacks_is_refused(recipe):
    recipe.data.template = "chat"
    with pytest.raises(ValueError, match="has no chat template"):
        sft.train(recipe)
    with pytest.raises(ValueError, match="has no chat template"):
        models.load(base=recipe.base, template="chat")
    with pytest.raises(ValueError, match=r"template='alpacca' is not one of .*did you mean 'alpaca'"):
        models.load(base=recipe.base, template="alpacca")


def test_training_reads_the_tokens_that_generation_reads(recipe, tmp_path, tiny_base, tiny_rows, monkeypatch):
    """On a tokenizer that puts begin-of-text before and end-of-text behind every text."""
    seen = []
    original = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer,
        "compute_loss",
        lambda self, model, inputs, *a, **k: (seen.append(dict(inputs)), original(self, model, inputs, *a, **k))[1],
    )
    recipe.base, recipe.max_steps = str(tmp_path / "base"), 1
    shutil.copytree(tiny_base, recipe.base)
    _, tokenizer = load_base(recipe.base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(recipe.base)
    sft.train(recipe)
    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    asked = [tuple(prompt_tokens(tokenizer, prompt_of(row, "short"))) for row in rows]
    assert all(tokens[0] == 1 and 2 not in tokens for tokens in asked)
    for batch in seen:
        for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            start = next(place for place, label in enumerate(labels) if label != -100)
            assert tuple(tokens[:start]) in asked
            assert [label for label in labels if label != -100].count(2) == 1


def test_what_is_cut_is_said(recipe, tmp_path, capsys):
    rows = [{"prompt": "p" * n, "completion": "c" * 10} for n in (4, 8, 12, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.data.train, recipe.data.max_length, recipe.max_steps = [str(tmp_path / "rows.jsonl")], 16, 1
    sft.train(recipe)
    assert "data.max_length=16 drops 1 of 4 rows, whose prompt alone is that long, and cuts the answer of 2" in (
        capsys.readouterr().out
    )


def test_a_base_that_is_packed_for_inference_is_refused(recipe, monkeypatch):
    class State:
        packing_format_for_cpu = True

    def packed(*args, **kwargs):
        model, tokenizer = load_base(*args, **kwargs)
        model.get_submodule("model.layers.1.mlp.up_proj").weight.quant_state = State()
        return model, tokenizer

    monkeypatch.setattr(sft, "load_base", packed)
    with pytest.raises(ValueError, match=r"4-bit weights of block 1: bitsandbytes has packed them for inference"):
        sft.train(recipe)


def chat_rows(folder: Path) -> Path:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = folder / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    return file


def test_chat_messages_need_a_chat_template_and_company_of_their_kind(recipe, tiny_rows, tmp_path):
    recipe.data.train = [str(chat_rows(tmp_path))]
    with pytest.raises(ValueError, match="has no chat template"):
        sft.train(recipe)
    recipe.data.train.append(str(tiny_rows))
    with pytest.raises(ValueError, match="mixes chat messages with plain rows"):
        sft.train(recipe)


def test_running_out_of_accelerator_memory_says_what_to_change(recipe, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "compute_loss", exhausted)
    with pytest.raises(TrainingStopped, match="out of accelerator memory at step 1: lower batch_size"):
        sft.train(recipe)


def test_an_adapter_of_the_embedded_base_names_it_and_not_a_folder(recipe):
    recipe.base, recipe.max_steps = "embedded", 1
    folder = sft.train(recipe)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    assert load_adapter(load_base("embedded")[0], folder).num_parameters() > 1e6
