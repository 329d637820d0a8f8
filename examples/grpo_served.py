"""Reinforcement learning of a mixture, with rollouts by vLLM: TRL's GRPO learns, `moa serve` answers.

Saves an untrained mixture, serves it, and lets GRPO raise a toy reward, the share of a letter in what is written. After
every step the server goes on with the new weights. Needs `pip install 'moa-lm[serve]'`; runs on a CPU.

    python examples/grpo_served.py [--base embedded] [--steps 24] [--output FOLDER]
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from trl import GRPOConfig, GRPOTrainer

import moa
from moa.integrations.rollouts import ServedRollouts
from moa.models import load
from moa.tasks import TASKS, generate

LETTER = "e"


def share_of_letter(completions: list[str], **_: object) -> list[float]:
    return [text.lower().count(LETTER) / max(len(text), 1) for text in completions]


def serve(adapter: Path, base: str, log: Path) -> tuple[subprocess.Popen, str]:
    """Start a server of one mixture, called policy, that takes new weights while it runs; waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moa", "serve", f"policy={adapter}", "--base", base, "--port", str(port)]
    options = ["--max-loras", "1", "--logprobs-mode", "processed_logprobs", "--dtype", "float32"]
    options += ["--chat-template", "{{ messages[0]['content'] }}"]  # nobody chats here
    options += ["--max-model-len", "512", "--enforce-eager"]  # few steps are over before anything is compiled
    memory = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; by itself an engine on a CPU asks for nearly all there is
    environment = memory | os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen([*command, *options], stdout=out, stderr=out, env=environment)
    url = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server did not start; its log ends with\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return server, url
        except OSError:
            time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO of a mixture whose rollouts come from vLLM.")
    parser.add_argument("--base", default="embedded", help="a folder, a hub name, or a name that moa knows")
    parser.add_argument("--task", choices=list(TASKS), default=next(iter(TASKS)), help="where prompts come from")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--output", default=None, help="default: a temporary folder")
    options = parser.parse_args()
    output = Path(options.output or tempfile.mkdtemp(prefix="moa-grpo-")).resolve()

    base, tokenizer = load(options.base, dtype="float32")
    base.name_or_path = base.config._name_or_path = options.base  # what the adapter's configuration says of its base
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = get_peft_model(base, moa.preset("soft-moa"))
    model.save_pretrained(output / "start")
    server, url = serve(output / "start", options.base, output / "server.log")
    try:
        rollouts = ServedRollouts(url, "policy", output / "weights", compare=True)
        prompts = [{"prompt": row["instruction"]} for row in generate(options.task, "train", 64)]
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=str(output / "trainer"),
                max_steps=options.steps,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=16,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=False,
                use_cpu=True,
            ),
            reward_funcs=share_of_letter,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            rollout_func=rollouts,
        )
        trainer.train()
    finally:
        server.terminate()
        server.wait(60)
    model.save_pretrained(output / "adapter")
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    third = max(1, len(rewards) // 3)
    first, last = (sum(part) / third for part in (rewards[:third], rewards[-third:]))
    print(f"reward:  {first:.3f} in the first third, {last:.3f} in the last")
    print(f"server and trainer differ in log-probabilities by at most {max(rollouts.gaps):.1e}")
    print(f"adapter: {output / 'adapter'}")


if __name__ == "__main__":
    main()
