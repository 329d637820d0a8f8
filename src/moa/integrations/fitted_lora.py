"""A mixture with gates as plain LoRA, which cannot compute the same: fitted to it on text, with the gap measured.

Where LoRA experts sit, the fit starts at what they add on average: their products side by side, scaled by their mean
gates, cut to the rank that is asked for. What prompts, parallel adapters and the gates' choices add beyond that is
learned from the mixture's own predictions: the base is unloaded from the mixture and trained with LoRA to give the same
probabilities at every answer token. Rows that were not fitted on say how far both are apart.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from moa.adapters.architectures import PROJECTIONS, find_module, linear_size
from moa.adapters.decoder import view_blocks
from moa.adapters.experts.lora import LoraLayer
from moa.adapters.low_rank import spread, widen
from moa.adapters.members import active_adapters, experts_of, mixtures_of
from moa.adapters.telemetry import gate_values
from moa.choices import check_range
from moa.data.tokens import Tokens, example_tokens
from moa.evaluation.generation import context
from moa.files import write_text
from moa.integrations.gap import Gap, answer_logits, in_batches, loss_of, own_answers, padded, repeats
from moa.integrations.lora import targets_of
from moa.training.beside import beside
from moa.training.recipe import FILE_NAME as RECIPE
from moa.training.recipe import Recipe

FILE_NAME = "gap.json"
HELD_OUT = 5
"""One row in so many is measured on and not fitted on."""

TOP = 64  # of the mixture's probabilities so many are kept, and the sum of the others
LEARNING_RATE = 1e-3


def sources_of_training(adapter: str) -> list[str]:
    """What an adapter was trained on, as its recipe names it.

    Raises:
        ValueError: there is no recipe beside it.
    """
    recipe = beside(adapter, RECIPE)
    if recipe is None:
        raise ValueError(f"there is no {RECIPE} with {adapter} that would say what to fit on: name it with --data")
    return Recipe.load(recipe).data.train


def save(student: PeftModel, gap: Gap, output: str | Path) -> None:
    """Write the LoRA as PEFT does, and ``gap.json`` beside it."""
    folder = Path(output)
    student.save_pretrained(str(folder))
    write_text(folder / FILE_NAME, json.dumps(asdict(gap), indent=1) + "\n")


def fit_lora(
    model: PeftModel,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str,
    rank: int | None = None,
    steps: int = 200,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], object] = lambda step: None,
) -> tuple[PeftModel, Gap]:
    """Make a LoRA that answers as much like a mixture as it can. The mixture is unloaded from its base on the way.

    Args:
        model: with one active mixture, its base's own weights unchanged.
        tokenizer: of the base.
        rows: to fit on, every fifth to measure on; see `moa.data.load_rows`.
        template: the mixture's prompt template.
        rank: of every matrix; None: with about as many parameters as the mixture has.
        steps: of AdamW; 0 leaves the mean of the LoRA experts.
        batch_size: rows per step.
        seed: of the order of rows and of what the mean leaves open.
        progress: called after every step with its number.

    Returns:
        The base with the LoRA, in evaluation mode, and what was measured.

    Raises:
        ValueError: fewer than ten rows that fit into the model's context, or not exactly one active mixture.
    """
    check_range("steps", steps, low=0, whole=True)
    if rank is not None:
        check_range("rank", rank, low=1, whole=True)
    names = active_adapters(model)
    if len(names) != 1:
        raise ValueError(f"one mixture becomes one LoRA, but active are {names or 'none'}: call set_adapter with one")
    examples = [example_tokens(tokenizer, row, template) for row in rows]
    examples = [example for example in examples if len(example.prompt) + len(example.answer) <= context(model)]
    if len(examples) < len(rows):
        print(f"note: {len(rows) - len(examples)} of {len(rows)} rows are longer than the model's context and left out")
    if len(examples) < 2 * HELD_OUT:
        raise ValueError(
            f"{len(examples)} rows that fit into the model's context are too few to fit on: give at least 10"
        )
    random.Random(seed).shuffle(examples)
    held, fitted = examples[::HELD_OUT], [one for place, one in enumerate(examples) if place % HELD_OUT]
    fitted.sort(key=lambda one: -len(one.prompt + one.answer))  # in the order of batches, as the lessons come

    model.eval()
    hosts = _hosts_of(model, names[0])
    starts = _starts(model, names[0], fitted, batch_size)
    lessons = [lesson for batch in in_batches(fitted, batch_size) for lesson in _lessons(model, batch)]
    written = own_answers(model, tokenizer, held, batch_size)
    loss = loss_of(model, held, batch_size)
    own = sum(p.numel() for name, p in model.named_parameters() if ".moa_" in name and f".{names[0]}." in name)

    base = model.unload()
    rank = rank or max(1, own // sum(map(sum, map(_size, hosts.values()))))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = _student(base, hosts, starts, rank)
    _teach(student, fitted, lessons, steps=steps, batch_size=batch_size, seed=seed, progress=progress)
    with student.disable_adapter():
        base_loss = loss_of(student, held, batch_size)
    same = [repeats(student, batch) for batch in in_batches(written, batch_size)]
    answers = [row for batch in same for row in batch]
    return student, Gap(
        loss=loss,
        lora_loss=loss_of(student, held, batch_size),
        base_loss=base_loss,
        agreement=sum(int(row.sum()) for row in answers) / sum(len(row) for row in answers),
        same_answers=sum(bool(row.all()) for row in answers) / len(answers),
        rows=len(held),
        rank=rank,
    )


# --- where LoRA goes, and where it starts -----------------------------------------------------------------------------


class Start(NamedTuple):
    """A product ``b a``: ``a`` (rank, in), ``b`` (out, rank)."""

    a: Tensor
    b: Tensor


def _hosts_of(model: PeftModel, adapter: str) -> dict[str, nn.Module]:
    """Linear layers to get LoRA: those with LoRA experts, or all projections if there are experts of other kinds."""
    base = model.get_base_model()
    layers = [layer for mixture in mixtures_of(model) for layer in experts_of(mixture, adapter)]
    chosen = [layer.host for layer in layers if isinstance(layer, LoraLayer)]
    if len(chosen) < len(layers):
        for view in view_blocks(base, model.peft_config[adapter].architecture).values():
            paths = {getattr(view.architecture, role) for role in PROJECTIONS} - {None}
            found = [find_module(view.module, path) for path in paths]
            chosen += [module for module in found if module is not None and linear_size(module) is not None]
    wanted = {id(module) for module in chosen}
    return {name: module for name, module in base.named_modules() if id(module) in wanted}


def _size(module: nn.Module) -> tuple[int, int]:
    size = linear_size(module)
    assert size is not None
    return size


def _starts(model: PeftModel, adapter: str, examples: Sequence[Tokens], batch_size: int) -> dict[int, Start]:
    """By identity of the host: what its LoRA experts add on average."""
    sums: dict[LoraLayer, Tensor] = {}
    count = 0
    for batch in in_batches(examples, batch_size):
        tokens, mask = padded([one.prompt + one.answer for one in batch])
        with gate_values(model, adapter) as record, torch.inference_mode():
            model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        shown = mask.bool()
        count += int(shown.sum())
        for mixture in mixtures_of(model):
            for layer in experts_of(mixture, adapter):
                if isinstance(layer, LoraLayer):
                    weights = torch.ones(*mask.shape, 1)
                    if layer.output[adapter] is not None:
                        column = mixture.column_outputs[adapter].index(layer.output[adapter])  # type: ignore[arg-type]
                        weights = record.gates[mixture.index][..., column : column + 1].float().cpu()
                    if layer.site in record.routes.get(mixture.index, {}):
                        weights = weights * record.routes[mixture.index][layer.site].float().cpu()
                    sums[layer] = sums.get(layer, 0) + weights[shown].sum(0)
    starts: dict[int, list[Start]] = {}
    for layer, total in sums.items():
        starts.setdefault(id(layer.host), []).append(_mean_product(layer, adapter, total / count))
    return {host: Start(torch.cat([s.a for s in of]), torch.cat([s.b for s in of], 1)) for host, of in starts.items()}


def _mean_product(layer: LoraLayer, adapter: str, weights: Tensor) -> Start:
    """One expert's copies side by side, weighted by (copies,)."""
    a = layer.moa_A[adapter].weight.detach().float().cpu()  # type: ignore[union-attr,operator]
    b = layer.moa_B[adapter].weight.detach().float().cpu()  # type: ignore[union-attr,operator]
    a = a.repeat(b.shape[1] // len(a), 1)  # copies may share it
    b = b * spread(weights, b.shape[1]) * layer.scaling[adapter]
    return Start(a, widen(b.t(), layer.place.part).t())


def _of_rank(start: Start, rank: int) -> Start:
    """The best approximation of a lower rank, or the same with room left: random rows of ``a``, zeros in ``b``."""
    a, b = start
    if len(a) > rank:
        (left, inner), (right, outer) = torch.linalg.qr(b), torch.linalg.qr(a.t())
        u, s, v = torch.linalg.svd(inner @ outer.t())
        root = s[:rank].sqrt()
        return Start((v[:rank] * root.unsqueeze(1)) @ right.t(), left @ u[:, :rank] * root)
    room = torch.empty(rank - len(a), a.shape[1])
    if len(room):
        nn.init.kaiming_uniform_(room, a=math.sqrt(5))
    return Start(torch.cat([a, room]), torch.cat([b, b.new_zeros(len(b), len(room))], 1))


def _student(base: Any, hosts: dict[str, nn.Module], starts: dict[int, Start], rank: int) -> PeftModel:
    targets = targets_of(list(hosts))
    if sum(name.rpartition(".")[2] in targets for name, _ in base.named_modules()) > len(hosts):
        targets = list(hosts)  # others have the same last names
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    student = get_peft_model(base, config)
    for name, module in hosts.items():
        layer: Any = student.get_base_model().get_submodule(name)
        columns, rows = _size(module)
        start = _of_rank(starts.get(id(module), Start(torch.zeros(0, columns), torch.zeros(rows, 0))), rank)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(start.a)
            layer.lora_B["default"].weight.copy_(start.b)
    return student


# --- what the mixture says --------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """What the mixture expects at every token of one answer: ``tokens`` (answer, `TOP`), their ``log_p``, and the
    probability of all ``others``.
    """

    tokens: Tensor
    log_p: Tensor
    others: Tensor


def _lessons(model: Any, batch: Sequence[Tokens]) -> list[Lesson]:
    with torch.inference_mode():
        logits = answer_logits(model, batch)
    lessons = []
    for part in logits:
        log_p, tokens = part.float().log_softmax(-1).topk(min(TOP, part.shape[-1]))
        others = (1 - log_p.exp().sum(-1)).clamp_min(0)
        lessons.append(Lesson(*(tensor.cpu().clone() for tensor in (tokens, log_p, others))))
    return lessons


def _distance(logits: Tensor, lesson: Lesson) -> Tensor:
    """Kullback-Leibler divergence from the lesson at every token, (answer,)."""
    log_q = logits.float().log_softmax(-1).gather(-1, lesson.tokens)
    others = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
    inside = (lesson.log_p.exp() * (lesson.log_p - log_q)).sum(-1)
    return inside + lesson.others * (lesson.others.clamp_min(1e-6).log() - others.log())


def _teach(
    student: PeftModel,
    examples: Sequence[Tokens],
    lessons: Sequence[Lesson],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int], object],
) -> None:
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    order = random.Random(seed)
    places: list[int] = []
    student.train()
    for step in range(steps):
        if len(places) < batch_size:
            places = order.sample(range(len(examples)), len(examples))
        batch, places = places[:batch_size], places[batch_size:]
        logits = answer_logits(student, [examples[place] for place in batch])
        taught = [Lesson(*(tensor.to(student.device) for tensor in lessons[place])) for place in batch]
        loss = torch.cat([_distance(part, lesson) for part, lesson in zip(logits, taught, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.step()
        progress(step + 1)
    student.eval()
