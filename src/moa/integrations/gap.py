"""How far a LoRA is from the mixture that it was fitted to, on rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from moa.data.tokens import Tokens
from moa.decoding import generate_by
from moa.evaluation.generation import batches, context, greedy, pad_left

ANSWER_TOKENS = 48
"""Of the mixture's own answers so many tokens are compared."""


@dataclass(frozen=True)
class Gap:
    """What LoRA lost, on rows that it was not fitted on.

    Attributes:
        loss: of the mixture on the rows' answers, nats per token.
        lora_loss: of the LoRA.
        base_loss: of the base without either.
        agreement: share of the tokens of the mixture's own greedy answers that LoRA would write, too.
        same_answers: share of these answers that it would write to the end.
        rows: how many rows.
        rank: of the LoRA.
    """

    loss: float
    lora_loss: float
    base_loss: float
    agreement: float
    same_answers: float
    rows: int
    rank: int

    def __str__(self) -> str:
        return (
            f"on {self.rows} held-out rows: answer loss {self.lora_loss:.4f} against the mixture's {self.loss:.4f} "
            f"(base {self.base_loss:.4f}), {self.agreement:.1%} of the mixture's greedy tokens, "
            f"{self.same_answers:.1%} of its answers whole, rank {self.rank}"
        )

    def check(self, max_loss_gap: float, min_agreement: float) -> None:
        """Raise ValueError if LoRA is further from the mixture than that."""
        if self.lora_loss - self.loss > max_loss_gap or self.agreement < min_agreement:
            raise ValueError(
                f"LoRA does not stand in for this mixture, and nothing was written: {self}. Asked for were a loss of "
                f"at most {max_loss_gap} above the mixture's and {min_agreement:.0%} of its tokens. Fit longer or "
                "wider (more data, steps, rank), or ask for less (--max-loss-gap, --min-agreement)"
            )


@torch.inference_mode()
def own_answers(model: Any, tokenizer: Any, examples: Sequence[Tokens], batch_size: int) -> list[Tokens]:
    """The prompts with what the model answers greedily, its end included."""
    answered = []
    room = context(model) - max(len(one.prompt) for one in examples)
    settings = greedy(model, tokenizer, max(1, min(ANSWER_TOKENS, room)))
    ends = set(settings.eos_token_id or [])
    for batch in in_batches(examples, batch_size):
        tokens, mask = pad_left([one.prompt for one in batch], settings.pad_token_id)
        output = generate_by(settings, model, input_ids=tokens.to(model.device), attention_mask=mask.to(model.device))
        for one, row in zip(batch, output[:, tokens.shape[1] :].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            answered.append(Tokens(one.prompt, row[:end]))
    return answered


@torch.inference_mode()
def repeats(model: Any, batch: Sequence[Tokens]) -> list[Tensor]:
    """For every token of every answer, whether the model would have chosen it."""
    logits = answer_logits(model, batch)
    return [part.argmax(-1).cpu() == torch.tensor(one.answer) for part, one in zip(logits, batch, strict=True)]


@torch.inference_mode()
def loss_of(model: Any, examples: Sequence[Tokens], batch_size: int) -> float:
    """Mean cross-entropy of the answers, nats per token."""
    total, count = 0.0, 0
    for batch in in_batches(examples, batch_size):
        for part, one in zip(answer_logits(model, batch), batch, strict=True):
            wanted = torch.tensor(one.answer, device=part.device)
            total += float(cross_entropy(part.float(), wanted, reduction="sum"))
            count += len(one.answer)
    return total / count


def answer_logits(model: Any, batch: Sequence[Tokens]) -> list[Tensor]:
    """Logits of every answer's tokens, one (answer, vocabulary) for each row."""
    tokens, mask = padded([one.prompt + one.answer for one in batch])
    output = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return [row[len(one.prompt) - 1 :][: len(one.answer)] for row, one in zip(output, batch, strict=True)]


def padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token rows, padded on the right, as (batch, longest), and their mask."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)


def in_batches(examples: Sequence[Tokens], batch_size: int) -> Iterator[list[Tokens]]:
    lengths = [one.prompt + one.answer for one in examples]
    for places in batches(range(len(examples)), lengths, batch_size):
        yield [examples[place] for place in places]
