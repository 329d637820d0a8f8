"""GRPO with rollouts from a server, which computes with the trainer's newest weights; here a small one of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_config, tiny_llama, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from moa.integrations.rollouts import ServedRollouts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rollout_func.*experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


class Server:
    """Answers the two requests as vLLM does, by the mixture that was loaded last."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.asked: list[dict[str, Any]] = []
        self.model: Any = None
        self.closed = False

    def load(self, content: dict[str, Any]) -> str:
        assert content["lora_name"] == "policy"
        assert content["load_inplace"] is True
        self.loaded.append(content["lora_path"])
        self.weights.append(load_file(Path(content["lora_path"], "adapter_model.safetensors")))
        self.model = PeftModel.from_pretrained(tiny_llama(), content["lora_path"]).eval()
        return "Success"

    @torch.no_grad()
    def complete(self, content: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(content)
        choices = []
        for index, prompt in enumerate(content["prompt"]):
            ids, values = list(prompt), []
            for _ in range(content["max_tokens"]):
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                scores = (logits / content["temperature"]).log_softmax(-1)
                token = int(torch.multinomial(scores.exp(), 1))
                ids.append(token)
                values.append(float(scores[token]))
            choice = {"index": index, "token_ids": ids[len(prompt) :], "logprobs": {"token_logprobs": values}}
            choices.insert(0, choice)  # in whatever order
        return {"choices": choices}


@pytest.fixture
def server() -> Iterator[Any]:
    own = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer: Any = "Not Found"
            if self.path == "/v1/completions":
                answer = own.complete(content)
            elif not own.closed:
                answer = own.load(content)
            is_text = isinstance(answer, str)
            body = (answer if is_text else json.dumps(answer)).encode()
            self.send_response(404 if answer == "Not Found" else 200)
            self.send_header("content-type", "text/plain" if is_text else "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    own.url = f"http://127.0.0.1:{http.server_port}/"  # type: ignore[attr-defined]
    yield own
    http.shutdown()
    thread.join()
    http.server_close()


def trainer_of(model: Any, folder: Path, rollouts: Any, **settings: Any) -> GRPOTrainer:
    options: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "temperature": 0.7,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(str(folder), **(options | settings)),
        reward_funcs=lambda completions, **_: [float(text.count("a")) + len(set(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["one", "two two", "three"] * 4}),
        processing_class=tiny_tokenizer(),
        rollout_func=rollouts,
    )


def test_every_step_is_rolled_out_with_its_own_weights(server, tmp_path):
    rollouts = ServedRollouts(server.url, "policy", tmp_path / "weights", compare=True)
    trainer = trainer_of(get_peft_model(tiny_llama(), tiny_config()), tmp_path, rollouts)
    trainer.train()
    assert [Path(folder).name for folder in server.loaded] == ["step-0", "step-1", "step-2"]
    assert [folder.name for folder in (tmp_path / "weights").iterdir()] == ["step-2"]
    first, second, third = server.weights
    for earlier, later in ((first, second), (second, third)):
        assert any(not torch.equal(tensor, later[name]) for name, tensor in earlier.items())
    assert len(rollouts.gaps) == 3
    assert max(rollouts.gaps) < 1e-4
    assert server.asked[0]["temperature"] == 0.7
    assert server.asked[0]["max_tokens"] == 5
    assert len(server.asked[0]["prompt"]) == 4


def test_conversations_are_written_by_the_tokenizer(server, tmp_path):
    rollouts = ServedRollouts(server.url, "policy", tmp_path)
    model = get_peft_model(tiny_llama(), tiny_config())
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, unwrap_model=lambda model: model),
        model=model,
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(use_vllm=False, generation_kwargs={"min_tokens": 2}),
        processing_class=tiny_tokenizer(),
        max_completion_length=2, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
    )  # fmt: skip
    found = rollouts([[{"role": "user", "content": "ab"}]], trainer)
    assert found["prompt_ids"] == [tiny_tokenizer()("u:ab\n")["input_ids"]]
    assert len(found["completion_ids"][0]) == len(found["logprobs"][0]) == 2
    assert server.asked[0]["min_tokens"] == 2
    rollouts([[{"role": "user", "content": "b"}]], trainer)
    assert len(server.loaded) == 1  # of one step: once


def test_a_server_that_takes_no_new_weights_says_how_it_would(server, tmp_path):
    server.closed = True
    rollouts = ServedRollouts(server.url, "policy", tmp_path)
    trainer = trainer_of(get_peft_model(tiny_llama(), tiny_config()), tmp_path, rollouts)
    with pytest.raises(RuntimeError, match="answers 404: Not Found; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        trainer.train()


def test_other_adapters_are_refused(server, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="ServedRollouts hands over mixtures"):
        trainer_of(model, tmp_path, ServedRollouts(server.url, "policy", tmp_path)).train()
