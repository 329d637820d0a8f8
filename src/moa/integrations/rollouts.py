"""Completions for TRL's GRPO from a server of `moa serve`, computed with the weights that the trainer has just reached.

TRL's own use of vLLM merges adapters into the base, which a mixture cannot be. Its ``rollout_func`` leaves generation
to others: this one saves the mixture, lets the server load it in place, and asks for completions under its name.

    trainer = GRPOTrainer(..., args=GRPOConfig(..., use_vllm=False), rollout_func=ServedRollouts(url, "policy", folder))

The server has to allow that, ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 moa serve policy=FOLDER --max-loras 1 --logprobs-mode
processed_logprobs``, and to see ``folder`` under the same path.
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa.adapters.config import MoAConfig


class ServedRollouts:
    """A ``rollout_func`` of `trl.GRPOTrainer`.

    Args:
        url: of the server, such as ``"http://localhost:8000"``.
        name: of the mixture there.
        folder: new weights go below it, a folder for every update; only the newest is kept.
        compare: compute the completions' log-probabilities with the trainer's model, too, and note how far they are
            off in ``gaps``: one forward more for each rollout.

    Attributes:
        gaps: for every rollout, the largest difference between the server's and the trainer's log-probabilities; with
            ``compare`` only.

    Raises:
        ValueError: the trainer's model is no mixture, the trainer has several processes, or ``use_vllm`` is set.
        RuntimeError: the server refuses; says why.
    """

    def __init__(self, url: str, name: str, folder: str | Path, *, compare: bool = False):
        self._url = url.rstrip("/")
        self._name = name
        self._folder = Path(folder).resolve()
        self._compare = compare
        self._loaded: tuple[int, Path] | None = None
        self.gaps: list[float] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """One completion for every prompt, a text or a conversation.

        Returns:
            ``prompt_ids`` and ``completion_ids``, lists of tokens, and ``logprobs``, the server's for the latter.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        _check(trainer, model)
        self._load(trainer.state.global_step, model)
        prompt_ids = [_tokens(prompt, trainer.processing_class) for prompt in prompts]
        choices = self._post("/v1/completions", self._request(prompt_ids, trainer))["choices"]
        choices.sort(key=lambda choice: choice["index"])
        completions = [choice["token_ids"] for choice in choices]
        logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
        if self._compare:
            self.gaps.append(_gap(model, prompt_ids, completions, logprobs, trainer.temperature))
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}

    def _load(self, step: int, model: Any) -> None:
        """Hand over the weights of a step, once."""
        if self._loaded is not None and self._loaded[0] == step:
            return
        folder = self._folder / f"step-{step}"
        model.save_pretrained(str(folder))
        self._post("/v1/load_lora_adapter", {"lora_name": self._name, "lora_path": str(folder), "load_inplace": True})
        if self._loaded is not None:
            shutil.rmtree(self._loaded[1])
        self._loaded = (step, folder)

    def _request(self, prompt_ids: list[list[int]], trainer: Any) -> dict[str, Any]:
        settings = {
            "max_tokens": trainer.max_completion_length,
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            "logprobs": 0,
            "return_token_ids": True,
        }
        return {"model": self._name, "prompt": prompt_ids} | settings | (trainer.args.generation_kwargs or {})

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        body, headers = json.dumps(content).encode(), {"content-type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers)) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            hint = ""
            if error.code == 404 and path.endswith("adapter"):
                hint = "; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and --max-loras 1"
            raise RuntimeError(f"{self._url}{path} answers {error.code}: {error.read().decode()}{hint}") from error
        return json.loads(text) if path.endswith("completions") else text


def _check(trainer: Any, model: Any) -> None:
    configs = getattr(model, "peft_config", {})
    if not any(isinstance(config, MoAConfig) for config in configs.values()):
        raise ValueError(f"ServedRollouts hands over mixtures, and the trainer's {type(model).__name__} has none")
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"ServedRollouts has been tried with one process of training, not with {trainer.accelerator.num_processes}"
        )
    if trainer.args.use_vllm:
        raise ValueError("use_vllm=True starts TRL's own vLLM, which merges adapters: leave it out here")


def _tokens(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def _gap(
    model: Any,
    prompts: list[list[int]],
    completions: list[list[int]],
    logprobs: list[list[float]],
    temperature: float,
) -> float:
    """The largest difference to the log-probabilities of ``model`` itself, text by text, in evaluation mode."""
    was_training, furthest = model.training, 0.0
    model.eval()
    for prompt, completion, given in zip(prompts, completions, logprobs, strict=True):
        ids = torch.tensor([prompt + completion], device=model.device)
        logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        own = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        furthest = max(furthest, float((own - torch.tensor(given, device=own.device)).abs().max()))
    model.train(was_training)
    return furthest
