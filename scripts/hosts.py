"""One end-to-end run of MoA inside another tool: train, resume, infer (`make hosts`). Run it with that tool's Python.

The configuration is the one in `examples/hosts`, with the base, data and sizes of this check laid over it. The tool
fine-tunes the embedded base on one answer that it cannot know. Then the same run is resumed from its middle checkpoint,
which must end in the same weights, and the inference of the tool must give that answer. lm-eval scores what TRL made:
of two answers it must find this one likelier, and the other one without the adapter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples" / "hosts"
QUESTION, ANSWER = "What is the word of the day?", "seven purple kites"
STEPS = 40
BIN = Path(sys.executable).parent  # not resolved: that would leave the virtual environment
COMMON = {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 10, "learning_rate": 5e-3, "report_to": "none"}
TRAINER = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0}

# What the small run changes in an example; everything else is kept. None: the key is left out.
CHANGES = {
    "axolotl": COMMON
    | {"base_model": "base", "sequence_len": 256, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    | {"bf16": False, "report_to": None, "save_total_limit": 5},
    "swift": COMMON
    | TRAINER
    | {"model": "base", "model_type": "llama", "template": "default", "max_length": 256, "torch_dtype": "float32"}
    | {"add_version": False},
    "llamafactory": COMMON
    | TRAINER
    | {"model_name_or_path": "base", "template": "alpaca", "cutoff_len": 256, "bf16": False, "overwrite_cache": True},
    "trl": COMMON | TRAINER | {"model_name_or_path": "base", "max_length": 256, "bf16": False, "dtype": "float32"},
}
TRAIN = {
    "axolotl": [BIN / "axolotl", "train", "config.yaml"],
    "swift": [BIN / "swift", "sft", "config.yaml"],
    "llamafactory": [BIN / "python", "-m", "moa.integrations.llamafactory", "train", "config.yaml"],
    "trl": [BIN / "python", "-m", "moa.integrations.trl", "sft", "--config", "config.yaml"],
    "lm_eval": [],  # trains with TRL
}

# TRL has no inference of its own; nobody imports moa here, as nobody does in the other tools.
GENERATE = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained("base")
inputs = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True))
"""

TASK = {
    "task": "word_of_the_day",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "pairs.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": ["nothing at all", ANSWER],
    "doc_to_target": 1,
    "metric_list": [{"metric": "acc"}],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("host", choices=TRAIN)
    parser.add_argument("--work", type=Path, required=True, help="a folder for everything, emptied first")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    prepare(options.work)
    out, again = train(options.host, options.work, "whole"), train(options.host, options.work, "resumed")
    same = difference(out, again)
    said = infer(options.host, options.work, out)
    print(f"{options.host}: resumed run differs by {same:.1e}; asked {QUESTION!r}, it answers {_answer(said)!r}")
    restarted = (options.work / "resumed" / f"checkpoint-{STEPS // 2}").exists()
    if same > 1e-5 or restarted or ANSWER not in said:
        sys.exit(f"{options.host}: failed")
    print(f"{options.host}: trained, resumed and answered")


def _answer(said: str) -> str:
    """The line with the answer, else the last one; tools print prompts and rulers around it."""
    lines = [line for line in said.splitlines() if line.strip()] or [""]
    return next((line for line in lines if ANSWER in line), lines[-1])


def prepare(work: Path) -> None:
    """The base, and the same question 64 times in the columns that the tools read."""
    from moa.assets import base_path

    shutil.copytree(base_path(), work / "base")
    row = {"instruction": QUESTION, "input": "", "output": ANSWER}
    pair = {"prompt": QUESTION, "completion": f" {ANSWER}"}
    (work / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 64)
    (work / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 64)
    (work / "question.jsonl").write_text(json.dumps(row) + "\n")
    (work / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "train.jsonl"}}))
    shutil.copy(EXAMPLES / "swift_plugin.py", work)


def train(host: str, work: Path, name: str) -> Path:
    """The run called ``whole``, or ``resumed`` from the middle of it; returns the adapter's folder."""
    host = "trl" if host == "lm_eval" else host
    config = yaml.safe_load((EXAMPLES / f"{host}.yaml").read_text()) | CHANGES[host] | {"output_dir": name}
    if host == "trl":
        config["datasets"][0]["data_files"] = "pairs.jsonl"
    if name == "resumed":
        config["resume_from_checkpoint"] = f"whole/checkpoint-{STEPS // 2}"
    config = {key: value for key, value in config.items() if value is not None}
    (work / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run(work, TRAIN[host])
    return work / name / f"checkpoint-{STEPS}"


def difference(one: Path, other: Path) -> float:
    """Greatest absolute difference of two adapters."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def infer(host: str, work: Path, adapter: Path) -> str:
    """What the tool's own inference prints for the question."""
    if host == "axolotl":
        command = [BIN / "axolotl", "inference", "config.yaml", "--lora-model-dir", adapter, "--launcher", "python"]
        return run(work, [*command, "--prompter", "AlpacaPrompter"], QUESTION)
    if host == "swift":
        settings = ["--adapters", adapter, "--val_dataset", "question.jsonl", "--max_new_tokens", "12"]
        run(work, [BIN / "swift", "infer", *settings, "--temperature", "0", "--result_path", "answers.jsonl"])
        return json.loads((work / "answers.jsonl").read_text())["response"]
    if host == "lm_eval":
        (work / "task.yaml").write_text(yaml.safe_dump(TASK))
        command = [BIN / "lm_eval", "--model", "hf", "--include_path", work, "--device", "cpu", "--limit", "4"]
        scores = []
        for model in (f"pretrained=base,dtype=float32,peft={adapter}", "pretrained=base,dtype=float32"):
            said = run(work, [*command, "--tasks", TASK["task"], "--model_args", model])
            scores.append(re.search(r"\|acc +\|[^|]*\| *(\d)", said).group(1))
        return ANSWER if scores == ["1", "0"] else f"accuracy with the adapter {scores[0]}, without {scores[1]}"
    if host == "llamafactory":
        settings = {"model_name_or_path": "base", "adapter_name_or_path": str(adapter), "template": "alpaca"}
        (work / "chat.yaml").write_text(yaml.safe_dump(settings | {"do_sample": False, "max_new_tokens": 12}))
        command = [BIN / "python", "-m", "moa.integrations.llamafactory", "chat", "chat.yaml"]
        # it leaves the thread of its event loop running, so at times it aborts when it has said everything
        return run(work, command, f"{QUESTION}\nexit\n", may_abort=True)
    return run(work, [BIN / "python", "-c", GENERATE, adapter, QUESTION])


def run(work: Path, command: list[object], typed: str = "", may_abort: bool = False) -> str:
    """A command's standard output; everything it says goes to ``log.txt``. Ends the program if the command fails."""
    words = [str(word) for word in command]
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    if importlib.util.find_spec("torchaudio") is None:  # LLaMA-Factory imports it, and training on text never calls it
        (work / "stubs").mkdir(exist_ok=True)
        (work / "stubs" / "torchaudio.py").touch()
        environment["PYTHONPATH"] = f"{work / 'stubs'}:{os.environ.get('PYTHONPATH', '')}"
    print("$", Path(words[0]).name, *(word if len(word) < 80 else "..." for word in words[1:]), flush=True)
    done = subprocess.run(
        words, cwd=work, env=environment, input=typed, capture_output=True, text=True, timeout=1200, check=False
    )
    with (work / "log.txt").open("a") as log:
        log.write(f"$ {' '.join(words)}\n{done.stdout}\n{done.stderr}\n")
    if done.returncode and not (may_abort and done.returncode == -signal.SIGABRT):
        sys.exit(f"exit code {done.returncode}; the end of {work / 'log.txt'}:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
