"""Damaged and hostile files: each loads as something valid or is refused in words that name it; nothing is touched."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from amount import amount
from peft import get_peft_model
from safetensors import safe_open
from test_models import SHAPE, write_gguf

import moa
from moa.cli.errors import USER_MISTAKE, code_of
from moa.cli.spans.recipe import SpanRecipe
from moa.data import load_rows
from moa.evaluation.models import load as load_to_use
from moa.models import config_of
from moa.report.watch import page_of
from moa.spans import SpanPlan
from moa.spans.evidence.calibration import load_items
from moa.spans.evidence.influence import Influence
from moa.spans.journal import Journal
from moa.studies.study import Study
from moa.training.base import load_base
from moa.training.recipe import Recipe

pytestmark = pytest.mark.torture

SECONDS, WAITING = 10, 60  # for one input: of the processor, and in all on a busy machine
MEMORY = 2**30  # bytes for one input above what is in use; none of them is larger than 32 MiB
STUDY = """
methods:
  soft-moa: {size: 4, length: 2}
  mine: {preset: lora, grow: [lora], budgets: [1000]}
  window: {spans: uniform, budgets: [0.5]}
budgets: [1000, 0.5]
claims: [{better: soft-moa, than: mine, budgets: [1000], metric: accuracy}]
data: {train: a.jsonl, then: [[b.jsonl]], test: ["tasks:all"], template: short}
tuning: {learning_rates: [1e-3, 1e-2], seeds: [7], budget: 1000}
training: {weight_decay: 0.1, dtype: float32}
seeds: [0, 1]
steps: 2
"""
STUDY = STUDY.replace("  soft-moa: {size: 4, length: 2}", "  soft-moa: {size: 4, length: 2, budgets: [1000]}")
SPANS = """
base: embedded
data: {source: "facts:", context: text, ask: "What?", answer: label}
lengths: [128, 256]
extend: [512]
validate_length: 384
density: [0.25, 0.5]
block: 16
sink: 32
"""
ROWS = [
    {"instruction": "1 + 1 = ?", "output": "2"},
    {"instruction": "Say it.", "input": "yes", "output": "yes", "answer": "yes"},
    {"question": "How many?", "answer": "Some. #### 3"},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "tools": [{"name": "f"}]},
    {"Body": "Two.", "Question": "How many?", "Answer": 2.0},
]


@dataclass
class Target:
    """What is damaged, how, and how it is read."""

    files: dict[str, Callable[[random.Random, bytes], bytes]]
    load: Callable[[Path], Any]
    weight: int = 1
    """Shares of all inputs: quick readers get more."""
    silent: bool = False
    """Whether what cannot be read is taken for absent."""
    seen: Counter[str] = field(default_factory=Counter)


def journal(folder: Path) -> None:
    Journal(folder / "journal.jsonl", {"model": "tiny", "items": 2}).append({"loss": 1.0})


def use(folder: Path) -> None:
    loaded = load_to_use(str(folder / "adapter"), dtype="float32")
    loaded.model(torch.tensor([[5, 6, 7]]))


def gguf(folder: Path) -> None:
    config_of(str(folder / "tiny.gguf"))
    load_base(str(folder / "tiny.gguf"), "float32")


TARGETS = {
    "plan": Target({"plan.json": damage.of_json}, lambda at: SpanPlan.load(at / "plan.json").kv_density(512), 8),
    "published plan": Target({"moa_alpha_beta.json": damage.of_json}, lambda at: SpanPlan.load(at).spans(512), 4),
    "recipe": Target({"recipe.yaml": damage.of_yaml}, lambda at: Recipe.load(str(at / "recipe.yaml")), 8),
    "span recipe": Target({"spans.yaml": damage.of_yaml}, lambda at: SpanRecipe.load(str(at / "spans.yaml")), 6),
    "study": Target({"study.yaml": damage.of_yaml}, lambda at: Study.load(str(at / "study.yaml")), 6),
    "rows": Target({"rows.jsonl": damage.of_lines}, lambda at: load_rows(str(at / "rows.jsonl"), split="train"), 8),
    "list of rows": Target({"rows.json": damage.of_json}, lambda at: load_rows(str(at / "rows.json"), split="test"), 4),
    "journal": Target({"journal.jsonl": damage.of_lines}, journal, 4),
    "items": Target({"items.jsonl": damage.of_lines}, lambda at: load_items(at / "items.jsonl", 8), 6),
    "influence": Target(
        {"influence.safetensors": damage.of_safetensors}, lambda at: Influence.load(at / "influence.safetensors"), 6
    ),
    "adapter": Target(
        {
            "adapter/adapter_config.json": damage.of_json,
            "adapter/adapter_model.safetensors": damage.of_safetensors,
            "adapter/recipe.yaml": damage.of_yaml,
            "adapter/spans.json": damage.of_json,
        },
        use,
        3,
    ),
    "base": Target(
        {
            "base/config.json": damage.of_json,
            "base/model.safetensors": damage.of_safetensors,
            "base/tokenizer.json": damage.of_json,
            "base/tokenizer_config.json": damage.of_json,
            "base/generation_config.json": damage.of_json,
        },
        lambda at: load_base(str(at / "base"), "float32"),
        1,
    ),
    "gguf": Target({"tiny.gguf": damage.of_gguf}, gguf, 1),
    "run": Target(
        {"run/training_log.jsonl": damage.of_lines, "run/progress.json": damage.of_json},
        lambda at: page_of(at / "run", refresh=None),
        3,
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_base, tiny_llama, tiny_tokenizer) -> Path:
    """A folder with one of each kind, as moa writes them."""
    folder = tmp_path_factory.mktemp("hostile") / "good"
    (folder / "run").mkdir(parents=True)
    shutil.copytree(tiny_base, folder / "base")
    plan = SpanPlan.uniform(2, 2, beta=0.5, sink=64, block=64, searched={"kind": "uniform", "lengths": [128]})
    plan.save(folder / "plan.json")
    (folder / "moa_alpha_beta.json").write_text(json.dumps({"alphas": [[64, 128]] * 2, "betas": [[0.5, 0.25]] * 2}))
    shutil.copy(Path(moa.__file__).parent / "recipes" / "embedded-soft-moa.yaml", folder / "recipe.yaml")
    (folder / "study.yaml").write_text(STUDY)
    (folder / "spans.yaml").write_text(SPANS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    journal(folder)
    items = Journal(folder / "items.jsonl", {"source": {"source": "facts:"}})
    for length in (8, 8, 16):
        items.append(
            {"length": length, "passage": 0, "tokens": [1, 2, 3, 4], "response": [[2, 4]], "signal": {"loss": 0.5}}
        )
    sums = torch.rand(2, 2, 4, 4)
    Influence(sums, sums.abs(), 64, 16, 2, 0.5, {"base": "embedded", "layers": [0, 1]}).save(
        folder / "influence.safetensors", "key"
    )
    model = get_peft_model(tiny_llama(), moa.preset("soft-moa", r=2, size=2, length=2, router={"hidden_per_expert": 1}))
    model.peft_config["default"].base_model_name_or_path = str(tiny_base)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "recipe.yaml").write_text(
        f"base: {tiny_base}\ndata: {{template: short}}\nadapter: {{r: 2, preset: soft-moa}}\n"
    )
    plan.save(folder / "adapter" / "spans.json")
    (folder / "run" / "recipe.yaml").touch()
    routers = [{"block": 0, "site": None, "experts": ["q", "k"], "gates": [0.5, 0.25]}]
    (folder / "run" / "progress.json").write_text(json.dumps({"step": 2, "steps": 4, "routers": routers}))
    log = [{"loss": 1.0, "step": step, "learning_rate": 1e-3, "router/gate": 0.5} for step in (1, 2)]
    (folder / "run" / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    write_gguf(folder / "tiny.gguf", tiny_llama(**SHAPE), tiny_tokenizer)
    return folder


def copied(good: Path, target: Target, folder: Path) -> Path:
    """A folder with what the target reads."""
    folder.mkdir()
    for part in {Path(name).parts[0] for name in target.files}:
        (shutil.copytree if (good / part).is_dir() else shutil.copy)(good / part, folder / part)
    return folder


class Hung(BaseException):
    """An input took too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """A time and a memory limit inside."""

    def stop(*_: object) -> None:
        raise Hung

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handlers = {kind: signal.signal(kind, stop) for kind in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


written: list[str] | None = None


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every path that is opened for writing, made, moved or removed."""
    if written is None:
        return
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
    if event in changes:
        written.extend(str(one) for one in arguments if isinstance(one, str | bytes | os.PathLike))
    elif event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            written.append(os.fsdecode(arguments[0]))
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        written.append(f"{event} {arguments!r}")


sys.addaudithook(listen)


def outcome(target: Target, folder: Path, damaged: str) -> str | None:
    """What is wrong with how an input was taken; None: nothing."""
    global written
    try:
        written = []
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.load(folder)
        target.seen["loaded"] += 1
    except Hung:
        return "hung"
    except Exception as error:
        target.seen[type(error).__name__] += 1
        said = str(error)
        if code_of(error) != USER_MISTAKE:
            return "".join(traceback.format_exception(error)[-3:])
        if Path(damaged).name not in said and str(folder / Path(damaged).parts[0]) not in said:
            return f"not named: {type(error).__name__}: {said}"
    finally:
        paths, written = written, None
    outside = [
        path for path in paths or [] if not Path(path).absolute().is_relative_to(folder) and "__pycache__" not in path
    ]
    return f"wrote {outside}" if outside else None


@pytest.mark.parametrize("kind", TARGETS)
def test_damage_is_told_or_harmless(kind: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = TARGETS[kind]
    number = amount(short=280, long=10_000) * target.weight // sum(one.weight for one in TARGETS.values()) + 1
    folder = tmp_path / "input"
    failures: dict[str, str] = {}
    target.load(copied(good, target, tmp_path / "sound"))
    for turn in range(number):
        rng = random.Random(zlib.crc32(f"{kind} {turn}".encode()))
        copied(good, target, folder)
        name = rng.choice(list(target.files))
        file = folder / name
        if rng.random() < 0.06:
            damage.at_path(rng, file)
        else:
            file.write_bytes(target.files[name](rng, file.read_bytes()))
        if wrong := outcome(target, folder, name):
            failures.setdefault(wrong.strip().splitlines()[-1][:150], f"turn {turn}, {name}: {wrong}")
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{kind}: {number} inputs, {dict(target.seen)}")
    assert not failures, "\n\n".join(list(failures.values())[:12])


def test_the_safetensors_damage_is_understood(good: Path):
    """The mutator reads headers by itself; that what it takes for one is one."""
    with safe_open(good / "influence.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"signed", "absolute"}
