"""Mistakes and mishaps: each one clear line, nothing lost, no stack trace for what the user did."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moa
from moa.cli import app
from moa.training import sft
from moa.training.base import load_adapter, load_base
from moa.training.checkpoints import WEIGHTS, checkpoints, last_complete
from moa.training.recipe import Recipe
from moa.training.stops import DiskFull


@pytest.fixture
def command(tiny_base, tiny_rows, tmp_path) -> list[str]:
    """A run of one step, as a user would type it."""
    return [
        *("train", "embedded-soft-moa", "--base", str(tiny_base), "--data.train", str(tiny_rows)),
        *("--output", str(tmp_path / "run"), "--max_steps", "1", "--batch_size", "2"),
    ]


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory) -> Path:
    """A saved adapter of the tiny model."""
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    config = moa.preset("soft-moa", r=2, size=2, length=2)
    get_peft_model(tiny_llama(), config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def complaint(arguments: list[str], code: int = 2) -> str:
    """What the command line says when it refuses, on one line."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


# The command line


def test_unknown_key(command):
    assert "no key 'learnin_rate' (did you mean 'learning_rate'?)" in complaint([*command, "--learnin_rate", "1"])
    assert "has no setting 'ranks'" in complaint([*command, "--adapter.ranks", "4"])


def test_impossible_values(command):
    assert "r=0 is outside of [1, inf]" in complaint([*command, "--adapter.r", "0"])
    assert "size=-1 is outside of [1, inf]" in complaint([*command, "--adapter.size=-1"])
    assert "'query' is not one of" in complaint([*command, "--adapter.targets", "[query]"])
    assert "batch_size=0 is outside of its range: at least 1" in complaint([*command, "--batch_size", "0"])


def test_flags_without_value_or_name(command):
    assert "--seed needs a value" in complaint([*command, "--seed"])
    assert "batch_size=[2, 'surplus'] must be a whole number" in complaint([*command, "surplus"])
    assert "unexpected argument 'surplus'" in complaint(["train", "embedded-soft-moa", "surplus"])


def test_wrong_usage_is_explained():
    assert "Missing argument" in complaint(["train"])
    assert "No such command 'trian'" in complaint(["trian"])


def test_unknown_recipe():
    assert "did you mean 'embedded-soft-moa'?" in complaint(["train", "embeded-soft-moa"])


def test_bad_row_is_named_by_file_and_line(command, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    said = complaint([*command, "--data.train", str(rows)])
    assert f"{rows}, line 2: found the fields ['instruction'], but needed one of" in said


def test_empty_data(command, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "the data set is empty" in complaint([*command, "--data.train", str(tmp_path / "empty.jsonl")])


def test_prompts_longer_than_max_length(command, tmp_path):
    assert "no answer is left to learn" in complaint([*command, "--data.max_length", "8"])
    assert not list((tmp_path / "run").glob("*"))


def test_missing_base(command, tmp_path, tiny_base):
    assert "there is no base model" in complaint([*command, "--base", str(tmp_path / "nowhere")])
    assert "did you mean 'tiny'" in complaint([*command, "--base", str(tiny_base.parent / "tinny")])
    assert "cannot load the base model 'nobody/nothing'" in complaint([*command, "--base", "nobody/nothing"])


def test_layers_that_the_base_does_not_have(command):
    assert "layers=[7], but the model has 2 blocks" in complaint([*command, "--adapter.layers", "[7]"])


def test_four_bit_without_accelerator(command):
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    assert "four_bit needs an accelerator" in complaint([*command, "--four_bit", "true"])


def test_a_mistake_shows_its_trace_only_when_asked():
    result = CliRunner().invoke(app, ["--debug", "train", "nothing-of-this-name"])
    assert result.exit_code == 2
    assert "Traceback" in result.output
    complaint(["train", "nothing-of-this-name"])


@pytest.mark.parametrize(
    ("bug", "shown"),
    [
        (lambda *args: [][0], "IndexError"),
        (lambda *args: dict(zip("ab", "c", strict=True)), "ValueError"),
        (lambda *args: torch.zeros(2).view(dtype="no dtype"), "TypeError"),
        (lambda *args: json.loads("{"), "JSONDecodeError"),
    ],
)
def test_a_bug_shows_its_trace_and_how_to_report_it(monkeypatch, bug, shown):
    monkeypatch.setattr(Recipe, "load", bug)
    result = CliRunner().invoke(app, ["train", "embedded-soft-moa"])
    assert result.exit_code == 1
    assert shown in result.output
    assert "Traceback" in result.output
    assert "moa env" in result.output


@pytest.mark.slow
def test_a_real_process_says_the_same(command):
    run = [sys.executable, "-m", "moa_command"]
    result = subprocess.run([*run, *command, "--sede", "1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("moa: embedded-soft-moa.yaml: the file has no key 'sede'")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("given", "policy"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_of_the_command_sleep_unless_told_otherwise(given, policy):
    """OpenMP shows, on request, what it read from the environment when torch loaded it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    command = [sys.executable, "-m", "moa_command", "env"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"OMP_WAIT_POLICY *= *'{policy}'", result.stderr, re.IGNORECASE)


# Output folders


def test_output_is_never_overwritten_unasked(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "is not empty and was not made by moa" in complaint(command)
    assert "is not empty and was not made by moa" in complaint([*command, "--overwrite"])
    assert "nothing to resume" in complaint([*command, "--resume"])
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_a_finished_run_is_kept_replaced_or_continued(command, tmp_path):
    assert CliRunner().invoke(app, command).exit_code == 0
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    assert "continue it with --resume, or give --overwrite" in complaint(command)
    assert "cannot resume with another setting: seed was 0" in complaint([*command, "--seed", "1", "--resume"])
    assert "exclude each other" in complaint([*command, "--resume", "--overwrite"])
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before
    assert CliRunner().invoke(app, [*command, "--overwrite", "--seed", "1"]).exit_code == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() != before


def test_nothing_of_an_earlier_run_survives_being_replaced(command, tmp_path, tiny_llama):
    run, plan = tmp_path / "run", tmp_path / "plan.json"
    moa.SpanPlan.uniform(2, 2, beta=0.5).save(plan)
    assert CliRunner().invoke(app, [*command, "--spans", str(plan)]).exit_code == 0
    first = {path.name for path in run.iterdir()}
    assert "spans.json" in first
    (run / "accuracy_after.json").write_text("{}")
    (run / "runs").mkdir()
    (run / "thesis.tex").write_text("years of work")
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert {path.name for path in run.iterdir()} == first - {"spans.json"} | {"thesis.tex"}


def test_resuming_compares_what_a_plan_says_and_not_where_it_lies(command, tmp_path):
    plan, copy, other = (tmp_path / f"{name}.json" for name in ("plan", "copy", "other"))
    moa.SpanPlan.uniform(2, 2, beta=0.5).save(plan)
    moa.SpanPlan.uniform(2, 2, beta=0.75).save(other)
    copy.write_bytes(plan.read_bytes())
    assert CliRunner().invoke(app, [*command, "--spans", str(plan)]).exit_code == 0
    result = CliRunner().invoke(app, [*command, "--spans", str(copy), "--resume"])
    assert result.exit_code == 0, result.output
    assert "another one" in complaint([*command, "--spans", str(other), "--resume"])
    assert "now names none" in complaint([*command, "--resume"])
    plan.write_bytes(other.read_bytes())
    assert "cannot resume with another setting" in complaint([*command, "--spans", str(plan), "--resume"])


def test_output_that_is_a_file(command, tmp_path):
    (tmp_path / "run").touch()
    assert "is a file, not a folder" in complaint(command)


# Full disks


@pytest.fixture
def run_of_four(tiny_base, tiny_rows, tmp_path) -> Recipe:
    return Recipe.load(
        "embedded-soft-moa",
        {"base": str(tiny_base), "data.train": str(tiny_rows), "output": str(tmp_path / "run"), "max_steps": "4"}
        | {"save_steps": "2", "batch_size": "2"},
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 100224 vs 100112"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_before(run_of_four, monkeypatch, error):
    real = torch.save

    def save(value, path, *args, **kwargs):
        real(value, path, *args, **kwargs)
        if "checkpoint-4" in str(path):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(DiskFull, match=r"no space left in .* while saving checkpoint-4; .*checkpoint-2 is intact"):
            sft.train(run_of_four)
    assert [path.name for path in checkpoints(Path(run_of_four.output))] == ["checkpoint-2"]
    sft.train(run_of_four, resume=True)
    assert last_complete(Path(run_of_four.output)).name == "checkpoint-4"


# Adapters on disk


def test_adapter_that_is_not_there(tiny_base, copy):
    base = load_base(str(tiny_base))[0]
    with pytest.raises(FileNotFoundError, match=r"there is no adapter .*did you mean 'adapter'"):
        load_adapter(base, copy.parent / "adaptor")
    (copy / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        load_adapter(base, copy)


def test_adapter_that_the_hub_does_not_give(tiny_base):
    with pytest.raises(ValueError, match="nobody/nothing"):
        load_adapter(load_base(str(tiny_base))[0], "nobody/nothing")


def test_adapter_without_weights(tiny_base, copy):
    (copy / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is missing"):
        load_adapter(load_base(str(tiny_base))[0], copy)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights(tiny_base, copy, damage):
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes({"truncated": content[:-10], "garbage": b"x" * 100, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or incomplete"):
        load_adapter(load_base(str(tiny_base))[0], copy)


def test_weights_that_are_not_finite(tiny_base, copy):
    tensors = load_file(copy / WEIGHTS)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(ValueError, match=r"adapter: the tensor \S+ is not finite"):
        load_adapter(load_base(str(tiny_base))[0], copy)


def test_a_base_that_lacks_tensors_is_not_drawn_at_random(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, e.g. model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(folder))


def test_damaged_configuration(tiny_base, copy):
    (copy / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        load_adapter(load_base(str(tiny_base))[0], copy)


def test_adapter_of_a_newer_format(tiny_base, copy):
    config = json.loads((copy / "adapter_config.json").read_text()) | {"format_version": 99, "telepathy": True}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"MoA format 99.*upgrade moa"):
        load_adapter(load_base(str(tiny_base))[0], copy)


def test_adapter_of_another_method(tiny_base, tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of the PEFT method 'LORA', not a Mixture of Adapters"):
        load_adapter(load_base(str(tiny_base))[0], tmp_path / "lora")


def test_adapter_of_another_base_names_tensor_and_shapes(tiny_llama, adapter):
    with pytest.raises(ValueError, match=r"moa_\S+ has shape \(.*32.*\) in the file, \(.*64.*\) in this model"):
        load_adapter(tiny_llama(hidden_size=64), adapter)


def test_adapter_of_a_deeper_base(tiny_llama, adapter):
    with pytest.raises(ValueError, match=r"missing, e.g. .*layers.2"):
        load_adapter(tiny_llama(num_hidden_layers=3), adapter)


def test_base_with_damaged_weights(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="cannot load the base model"):
        load_base(str(folder))


def test_pickled_base_weights_are_not_read(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the base model"):
        load_base(str(tmp_path))


# Recipes


def test_recipes_are_listed_copied_and_validated(tmp_path, tiny_base):
    runner = CliRunner()
    assert "embedded-soft-moa" in runner.invoke(app, ["recipes", "ls"]).output
    assert runner.invoke(app, ["recipes", "cp", "embedded-soft-moa", str(tmp_path)]).exit_code == 0
    copied = tmp_path / "embedded-soft-moa.yaml"
    assert "exists already" in complaint(["recipes", "cp", "embedded-soft-moa", str(copied)])
    result = runner.invoke(app, ["recipes", "validate", str(copied), "--base", str(tiny_base)])
    assert result.exit_code == 0, result.output
    assert "router" in result.output
    assert "did you mean 'seed'" in complaint(["recipes", "validate", str(copied), "--sed", "1"])


def test_help_lists_every_key_and_env_runs():
    runner = CliRunner()
    page = runner.invoke(app, ["train", "--help"]).output
    assert all(f"--{key}" in page for key in ("data.max_length", "warmup_ratio", "gradient_accumulation_steps"))
    assert "transformers: 5" in runner.invoke(app, ["env"]).output


# What is written


def test_where_nothing_can_be_written_is_told_before_the_work(adapter, tiny_base, tiny_rows, tmp_path):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    asked = ["--base", str(tiny_base), "--data", str(tiny_rows), "--limit", "10"]
    for place in ("folder.html", "file/x.html"):
        for verb in ("eval", "inspect"):
            said = complaint([verb, str(adapter), *asked, "--output", str(tmp_path / place)])
            assert "--output=" in said
            assert place.partition("/")[0] in said
            assert "Loading" not in said
            assert "Accuracy" not in said
    said = complaint(["export", str(adapter), *asked, "--output", str(tmp_path / "file")])
    assert "is a file, and must be a folder" in said


def test_a_plan_for_another_model_writes_nothing(command, tmp_path):
    file = moa.SpanPlan.dense(3, 2).save(tmp_path / "plan.json")
    assert "the plan has 3 layers, the model 2" in complaint([*command, "--spans", str(file)])
    assert not (tmp_path / "run").exists()


def test_a_study_that_cannot_run_writes_nothing(tiny_base, tmp_path, monkeypatch):
    study = tmp_path / "study.yaml"
    study.write_text(f"base: {tiny_base}\nmethods: {{lora: null}}\nbudgets: [3000]\noutput: {tmp_path / 'out'}\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "needs the package 'ray'" in complaint(["bench", str(study), "--engine", "ray"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    assert "is a file, and must be a folder" in complaint(["bench", str(study)])


def test_an_export_does_not_replace_its_adapter(copy, tiny_base, tiny_rows):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    loose = ["--steps", "0", "--limit", "10", "--max-loss-gap", "100", "--min-agreement", "0"]
    said = complaint(
        ["export", str(copy), "--output", f"{copy}/", "--base", str(tiny_base), "--data", str(tiny_rows), *loose]
    )
    assert "is the adapter itself" in said
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert "holds the official adapter" in complaint(
        ["import-reference", str(copy / "adapter_model.safetensors"), "--base", str(tiny_base), "--output", str(copy)]
    )


def test_an_adapter_to_export_that_is_not_there(tmp_path):
    assert "there is no adapter" in complaint(["export", str(tmp_path / "gone"), "--output", str(tmp_path / "out")])
    assert "holds no adapter" in complaint(["export", str(tmp_path), "--output", str(tmp_path / "out")])


def test_a_task_beside_all_or_twice():
    assert "no bundled task 'all'" in complaint(["eval", "--data", "tasks:all,sorting"])
    assert "'tasks:sorting,sorting' names 'sorting' twice" in complaint(["eval", "--data", "tasks:sorting,sorting"])
