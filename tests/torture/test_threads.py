"""Several threads that generate on one model at once, with adapters and under a span plan, get what one gets alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier
from typing import Any

import pytest
import tiny
import torch
from amount import amount
from torch import Tensor

from moa.spans import SpanPlan, apply_spans

pytestmark = pytest.mark.torture
THREADS = 4
MODELS: dict[str, Callable[[], Any]] = {
    "base": tiny.tiny_llama,
    "token": tiny.tiny_moa,
    "instance": lambda: tiny.tiny_moa(tiny.tiny_config(router={"level": "instance", "hidden_per_expert": 4})),
}


def answer(model: Any, number: int, sample: bool = False) -> Tensor:
    """Twelve tokens after a prompt that differs in length and content from one number to the next."""
    prompt = tiny.tokens(1 + number % 2, 20 + 3 * number, seed=number)
    mask = torch.ones_like(prompt)
    return model.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=sample, use_cache=True
    )


@pytest.mark.parametrize(
    ("name", "spans"),
    # Instance-level routing does not read the mask of a span plan, and says so.
    [("base", True), ("token", False), ("token", True), ("instance", False)],
)
def test_threads_get_what_one_gets(name: str, spans: bool):
    model = MODELS[name]()
    plan = SpanPlan([[0.0, 8.0], [16.0, 0.0]], [[0.25, 0.5], [0.0, 1.0]], sink=4, block=4)
    with apply_spans(model, plan) if spans else nullcontext():
        alone = [answer(model, number) for number in range(THREADS)]
        for _ in range(amount(short=2, long=60)):
            start = Barrier(THREADS)

            def one(number: int, start: Barrier = start) -> Tensor:
                start.wait()
                return answer(model, number)

            with ThreadPoolExecutor(THREADS) as pool:
                together = list(pool.map(one, range(THREADS)))
            for mine, others in zip(alone, together, strict=True):
                assert torch.equal(mine, others)
