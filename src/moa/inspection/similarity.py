"""Representation collapse: whether experts do the same to the same tokens.

Two numbers. *CKA* asks whether two outputs tell tokens apart alike; it compares experts that write to different places
and of different width. *Cosine* asks whether two outputs point the same way; it is for copies at one site. Copies that
share their first matrix can have a CKA near 1 and a cosine near 0: they read the same and write differently.

Linear CKA (Kornblith et al. 2019) is biased towards 1 when there are few tokens for the width; the debiased form is
used (Nguyen et al. 2021, with the unbiased HSIC of Song et al. 2012): 0 for unrelated outputs, 1 for equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moa.adapters.block import Mixture
from moa.adapters.members import mixtures_of
from moa.inspection.contributions import Output, outputs_of
from moa.inspection.results import Similarity

SAMPLE = 512
"""Most tokens that outputs are compared on: a comparison holds a matrix of this many rows and columns per output."""

FEWEST = 4  # tokens; the debiased estimate divides by n (n - 3)


def similarity(model: Any, adapter: str, texts: Sequence[Sequence[int]]) -> tuple[list[Similarity], int]:
    """Compare the experts of every block, and the copies of every expert, on the first `SAMPLE` tokens of ``texts``.

    Args:
        model: in evaluation mode. All texts run in one forward.
        adapter: whose experts.
        texts: token ids of each text.

    Returns:
        Comparisons, block by block, and the number of tokens they rest on. Where fewer than two outputs can be
        compared there is no entry.
    """
    rows = _sample(texts)
    longest = max(map(len, rows), default=0)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    if not rows or int(mask.sum()) < FEWEST:
        return [], 0
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    found: list[Similarity] = []
    with torch.no_grad(), ExitStack() as stack:
        for mixture in mixtures_of(model):
            stack.enter_context(_compared(mixture, adapter, mask.flatten().bool(), found))
        model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    return found, int(mask.sum())


def linear_cka(left: Tensor, right: Tensor) -> float | None:
    """Debiased linear CKA of two outputs (tokens, any width); None if one of them is the same for all tokens."""
    return _alike(u_centred(left), u_centred(right))


def mean_cosine(left: Tensor, right: Tensor) -> float | None:
    """Mean over tokens of the cosine of two outputs (tokens, features); tokens where one is 0 are left out."""
    speaking = (left != 0).any(-1) & (right != 0).any(-1)
    if not speaking.any():
        return None
    return float(torch.cosine_similarity(left[speaking].double(), right[speaking].double(), dim=-1).mean())


def u_centred(output: Tensor) -> Tensor:
    """The Gram matrix of (tokens, features), U-centred: the inner product of two such is the unbiased HSIC's.

    (Székely and Rizzo 2014, eq. 2.1.) It is (tokens, tokens) with a zero diagonal, and every row sums to zero.
    """
    # A constant output becomes exactly 0 here, where its Gram matrix would leave rounding errors to be compared.
    output = output.double() - output[:1].double()
    gram = (output @ output.T).fill_diagonal_(0)
    n = len(gram)
    rows = gram.sum(0) / (n - 2)
    return (gram - rows - rows.unsqueeze(1) + gram.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def _alike(left: Tensor, right: Tensor) -> float | None:
    size = left.norm() * right.norm()
    return float((left * right).sum() / size) if size > 0 else None


def _sample(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    rows, room = [], SAMPLE
    for text in texts:
        if room <= 0:
            break
        rows.append(list(text[:room]))
        room -= len(text)
    return rows


def _compared(mixture: Mixture, adapter: str, text: Tensor, found: list[Similarity]) -> ExitStack:
    """Watch one block; as soon as it has run, compare its experts and forget their outputs."""
    stack = ExitStack()
    seen = stack.enter_context(outputs_of(mixture, adapter))

    def compare(block: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        outputs = {site: output for site, notes in seen.items() if (output := notes.output) is not None}
        found.extend(_comparisons(mixture.index, outputs, text))
        for notes in seen.values():
            notes.clear()

    stack.callback(mixture.host.register_forward_hook(compare).remove)
    return stack


def _comparisons(block: int, outputs: dict[str, Output], text: Tensor) -> list[Similarity]:
    wholes = {site: output.whole.cpu()[text] for site, output in outputs.items()}
    compared = [_comparison(block, None, wholes, cosine=False)]
    for site, output in outputs.items():
        if output.copies is not None:
            copies = {f"{site}/{number}": values[text] for number, values in enumerate(output.copies.cpu())}
            compared.append(_comparison(block, site, copies, cosine=True))
    return [entry for entry in compared if len(entry.names) > 1]


def _comparison(block: int, site: str | None, outputs: dict[str, Tensor], *, cosine: bool) -> Similarity:
    values = list(outputs.values())
    grams = [u_centred(value) for value in values]
    return Similarity(
        block=block,
        site=site,
        names=list(outputs),
        cka=[[_alike(left, right) for right in grams] for left in grams],
        cosine=[[mean_cosine(left, right) for right in values] for left in values] if cosine else None,
    )
