"""What the documentation shows is run: every block of code or commands, or it says why not; messages are real ones."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

import moa
from moa.cli import app
from moa.cli.keys import flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<why><!-- not run: (?P<reason>.+?) -->\n+)?```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S)

# What makes commands of the pages short: flags that come last win.
TRAIN = (
    "--max_steps 2 --batch_size 2 --dtype float32 --data.template short --data.max_length 128 --data.train rows.jsonl"
)
SHORT = {
    "train": f"--base BASE {TRAIN}",
    "eval": "--base BASE --data rows.jsonl --limit 2 --max-new-tokens 2",
    "inspect": "--base BASE --data rows.jsonl --limit 2 --max-new-tokens 2 --examples 0",
    "generate": "--base BASE --max-new-tokens 2",
    "watch": "--output watch.html",
    "spans": "--base BASE --data.source tasks:lines --lengths 96 192 --extend 320 --validate_length 256 --items 2 "
    "--validate_items 2 --max_new_tokens 2 --signal 0 --dtype float32 --density 0.5 --step 32 --slopes 5 --sink 16 "
    "--block 16",
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and why it is not run."""

    kind: str
    text: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        yield Block(found["kind"], found["text"], found["reason"])


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_block_is_found_and_of_a_kind_that_is_checked(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(list(blocks(page)))
    assert {block.kind for block in blocks(page)} <= {"python", "bash", "yaml", "toml", "text", "bibtex"}
    assert all(len(block.reason) > 15 for block in blocks(page) if block.reason)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base, tiny_rows):
    """A folder with what pages speak of, and the names that their Python assumes."""
    folder = tmp_path_factory.mktemp("docs")
    rows = [json.loads(line) for line in Path(tiny_rows).read_text().splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("my-test.jsonl", "my-data.jsonl", "gsm8k-test.jsonl", "question.txt"):
        (folder / name).write_text((folder / "rows.jsonl").read_text())
    plan = moa.SpanPlan.uniform(2, 2, 0.5)
    plan.save(folder / "span_plan.json")
    return folder, tiny_base


def names(base: Path) -> dict[str, Any]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    inputs = dict(tokenizer("abc", return_tensors="pt"))
    data = Dataset.from_list([{"prompt": "a", "completion": " b"}] * 4)
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4)
    return {"model": model, "base": model, "tokenizer": tokenizer, "inputs": inputs, "batch": inputs, "data": data} | {
        "tokens": tokens,
        "Trainer": Trainer,
        "moa": moa,
        "torch": torch,
    }


ADAPTED = ["docs/howto/evaluate.md"]
"""Pages whose Python begins with a model that has an adapter."""

PYTHON = [page for page in PAGES if any(block.kind == "python" and not block.reason for block in blocks(page))]


@pytest.mark.filterwarnings("ignore")  # of tiny models in real trainers
@pytest.mark.parametrize("page", PYTHON, ids=[str(page.relative_to(ROOT)) for page in PYTHON])
def test_python_of_a_page_runs(page, world, monkeypatch, tmp_path):
    folder, base = world
    monkeypatch.chdir(tmp_path)
    for file in folder.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place = names(base)
    moa_adapter(place["model"], base, tmp_path / "my-adapter")
    moa_adapter(place["model"], base, tmp_path / "runs" / "first")
    monkeypatch.setattr("trl.SFTConfig", lambda **given: tiny_arguments(SFTConfig, given))
    monkeypatch.setattr(
        "trl.SFTTrainer", lambda model=None, **given: SFTTrainer(model_of(model, place), **tiny_data(given))
    )
    place |= {"SFTTrainer": SFTTrainer, "SFTConfig": lambda **given: tiny_arguments(SFTConfig, given)}
    if str(page.relative_to(ROOT)) in ADAPTED:
        place["model"] = get_peft_model(place["model"], moa.preset("soft-moa"))
    place["args"] = TrainingArguments("out", max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True)
    for block in blocks(page):
        if block.kind == "python" and not block.reason:
            exec(compile(block.text, str(page), "exec", dont_inherit=True), place)


def model_of(given: Any, place: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(place["base"].name_or_path) if isinstance(given, str) else given


def tiny_data(given: dict[str, Any]) -> dict[str, Any]:
    return given


def tiny_arguments(cls: Any, given: dict[str, Any]) -> Any:
    """The page's arguments, for one step on a processor."""
    given = given | {"output_dir": "out", "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none"}
    return cls(**given | {"use_cpu": True, "bf16": False})


def moa_adapter(model: Any, base: Path, folder: Path) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), moa.preset("soft-moa"))
    adapted.save_pretrained(folder)


COMMANDS = [page for page in PAGES if any(block.kind == "bash" and not block.reason for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", COMMANDS, ids=[str(page.relative_to(ROOT)) for page in COMMANDS])
def test_commands_of_a_page_run(page, world, monkeypatch, tmp_path):
    folder, base = world
    monkeypatch.chdir(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name in ("first", "soft-moa", "molora"):
        moa_adapter(None, base, tmp_path / "runs" / name)
    (tmp_path / "runs" / "first" / "recipe.yaml").write_text(f"base: {base}\n")
    for block in blocks(page):
        for line in block.text.splitlines() if block.kind == "bash" and not block.reason else ():
            run(line, base)


def run(line: str, base: Path) -> None:
    """One line of a page, through the command itself, made short by flags at its end."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "moa", f"{line!r} is no command of moa: say why the block is not run"
    text = None
    for sign in [sign for sign in ("<", ">") if sign in words]:
        place = words.index(sign)
        text = Path(words[place + 1]).read_text()[:200] if sign == "<" else text
        del words[place : place + 2]
    verb = words[1]
    if verb in ("train",) and (Path(words[words.index("--output") + 1]) / "adapter_config.json").exists():
        words.append("--overwrite") if "--resume" not in words else None
    short = SHORT.get(verb, "").replace("BASE", str(base)).split()
    result = CliRunner().invoke(app, [*words[1:], *short], input=text)
    assert result.exit_code == 0, (line, result.output)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_other_blocks_are_read(page):
    for block in blocks(page):
        if block.kind == "yaml" and not block.text.startswith("--8<--"):
            assert isinstance(yaml.safe_load(block.text), dict)
        if block.kind == "toml":
            tomllib.loads(block.text)


def test_the_study_and_the_span_recipe_of_the_pages_are_valid(tmp_path):
    from moa.cli.spans.recipe import SpanRecipe
    from moa.studies.study import Study

    for page, cls in (("bench.md", Study), ("spans.md", SpanRecipe)):
        text = next(block.text for block in blocks(ROOT / "docs" / "howto" / page) if block.kind == "yaml")
        (tmp_path / page).with_suffix(".yaml").write_text(text)
        cls.load(str((tmp_path / page).with_suffix(".yaml")))


def test_every_public_name_has_a_place_in_the_api_pages():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert [name for name in moa.__all__ if f"::: moa.{name}\n" not in text] == []


def test_messages_of_the_troubleshooting_page_are_real():
    source = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages that are written in several pieces
    source += "".join(source.replace("{what}", what) for what in ("base model", "load"))
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [one for one in re.findall(r"^\| `([^`]+)` \|", text, re.M)]
    assert len(messages) > 30
    assert [one for one in messages if one not in source] == []


NOTEBOOKS = {
    "fine_tune": "BASE = {base!r}\nROWS, STEPS, BATCH = 4, 2, 2",
    "compress": "BASE = {base!r}\nRECIPE, FLAGS = {recipe!r}, []\nTOKENS = 128",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, world, monkeypatch, tmp_path):
    """Its code in one namespace, with other values in the cell that is tagged as parameters."""
    _, base = world
    monkeypatch.chdir(tmp_path)
    flags = [word.replace("BASE", str(base)) for word in SHORT["spans"].split()]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(spans_recipe(flags)))
    monkeypatch.setattr("subprocess.run", run_here)
    place = {"__name__": "notebook"}
    cells = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    for cell in code:
        assert cell["outputs"] == []
        parameters = "parameters" in cell["metadata"].get("tags", [])
        text = NOTEBOOKS[name].format(base=str(base), recipe=str(recipe)) if parameters else "".join(cell["source"])
        exec(compile(text, name, "exec", dont_inherit=True), place)
    found = SimpleNamespace(**place)
    if name == "fine_tune":
        assert len(found.losses) == 2
        assert isinstance(found.answer, str)
    else:
        assert found.searched_bytes < found.dense_bytes


def run_here(command: list[str], *, check: bool) -> None:
    """What a notebook starts as a process, through the command itself: no four times the imports."""
    assert (command[:3], check) == ([sys.executable, "-m", "moa"], True)
    result = CliRunner().invoke(app, command[3:])
    assert result.exit_code == 0, (command, result.output)


def spans_recipe(arguments: list[str]) -> dict[str, Any]:
    """A span recipe of these flags, to be read from a file."""
    given = {
        key: yaml.safe_load(str(value).replace("'", "")) for key, value in flags(arguments).items() if key != "base"
    }
    return {"data": {"source": given.pop("data.source")}} | given
