"""How routers decide while training: a handful of figures in the trainer's log, hence in its experiment tracker."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa.adapters.telemetry import DEAD, GateRecord, Place, gate_values


class Tally:
    """Sums over the tokens that one router saw, as float32 tensors on its device, which is never waited for.

    Attributes:
        tokens: how many.
        gates, active: (experts,) sums of gates, and of whether they were not zero.
        entropy: sum of the entropy of a token's gates over their sum, divided by its maximum.
        threshold: sum, or None for gatings without one.
    """

    def __init__(self) -> None:
        self.tokens: Any = 0
        self.gates: Any = 0
        self.active: Any = 0
        self.entropy: Any = 0
        self.threshold: Any = None

    def add(self, gates: Tensor, counted: Tensor, threshold: Tensor | None) -> None:
        """Count gates (batch, tokens, experts) and thresholds (batch, tokens, 1) where ``counted`` (batch, tokens)."""
        one = counted.unsqueeze(-1).float()
        gates = gates.float() * one
        self.tokens = self.tokens + one.sum()
        self.gates = self.gates + gates.sum((0, 1))
        self.active = self.active + (gates != 0).float().sum((0, 1))
        shares = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        self.entropy = self.entropy + torch.special.entr(shares).sum() / math.log(max(gates.shape[-1], 2))
        if threshold is not None:
            self.threshold = (0 if self.threshold is None else self.threshold) + (threshold.float() * one).sum()

    @property
    def utilisation(self) -> Tensor:
        """(experts,): each one's part of all gates, over an equal part."""
        total = self.gates.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return self.gates / total * len(self.gates)

    @property
    def dead(self) -> Tensor:
        """(experts,) bool: those that hardly act on any token."""
        return (self.gates / self.tokens < DEAD) | (self.active / self.tokens < DEAD)


class RouterCallback(TrainerCallback):
    """Counts gates of training forwards and adds `figures` of them to every logged training loss.

    `log_router` puts it in place.

    Attributes:
        labels: of the step's batch, (batch, tokens); tokens with -100 do not count. None: all text tokens count.
        seen: of every router its block, site (None for the block's own), experts and mean gates, as of the last log.
    """

    def __init__(self, adapter: str | None = None):
        self.adapter = adapter
        self.labels: Tensor | None = None
        self.seen: list[dict[str, Any]] = []
        self._watching = ExitStack()
        self._tallies: dict[Place, Tally] = defaultdict(Tally)
        self._columns: dict[int, list[str]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._watching.close()
        record = self._watching.enter_context(gate_values(model, self.adapter))
        self._columns = record.columns

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            record.clear()

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if module.training and torch.is_grad_enabled():  # not evaluation, nor generation between steps
                self._count(record, kwargs.get("attention_mask"))
            record.clear()

        self._watching.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._watching.callback(model.register_forward_hook(after, with_kwargs=True).remove)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watching.close()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        seen = {place: tally for place, tally in self._tallies.items() if tally.tokens > 0}
        if logs is None or "loss" not in logs or not seen:
            return
        found = figures(seen, self._columns)
        self.seen = [self._mean_gates(place, tally) for place, tally in seen.items()]
        self._tallies.clear()
        logs |= found
        state.log_history[-1] |= found

    def _mean_gates(self, place: Place, tally: Tally) -> dict[str, Any]:
        means = [float(f"{value:.4g}") for value in (tally.gates / tally.tokens).tolist()]
        own = place.site is None
        names = self._columns.get(place.block, []) if own else [str(number) for number in range(len(means))]
        return {"block": place.block, "site": place.site, "experts": names, "gates": means}

    def _count(self, record: GateRecord, mask: Any) -> None:
        for place, decided in record.decisions():
            self._add(place, decided.gates, decided.threshold, mask)

    def _add(self, place: Place, gates: Tensor, threshold: Tensor | None, mask: Any) -> None:
        if self.labels is not None and self.labels.shape == gates.shape[:-1]:
            counted = self.labels != -100
        elif isinstance(mask, Tensor) and mask.shape == gates.shape[:-1]:
            counted = mask.bool()
        else:
            counted = gates.new_ones(gates.shape[:-1], dtype=torch.bool)
        self._tallies[place].add(gates, counted.to(gates.device), threshold)


def figures(tallies: Mapping[Place, Tally], columns: Mapping[int, list[str]]) -> dict[str, float]:
    """What is logged; means over routers.

    Returns:
        ``router/utilisation_min`` and ``_max`` over all experts of all routers (1: an equal part of the gates),
        ``router/utilisation/NAME`` of every column of the blocks' routers, ``router/gate`` (mean),
        ``router/entropy`` (1: all gates equal), ``router/dead`` (share of experts that hardly act) and, for gatings
        that have one, ``router/threshold``.
    """
    utilisation = torch.cat([tally.utilisation for tally in tallies.values()])
    found = {
        "utilisation_min": utilisation.min(),
        "utilisation_max": utilisation.max(),
        "gate": _mean([tally.gates.mean() / tally.tokens for tally in tallies.values()]),
        "entropy": _mean([tally.entropy / tally.tokens for tally in tallies.values()]),
        "dead": torch.cat([tally.dead for tally in tallies.values()]).float().mean(),
    }
    thresholds = [tally.threshold / tally.tokens for tally in tallies.values() if tally.threshold is not None]
    if thresholds:
        found["threshold"] = _mean(thresholds)
    by_name = defaultdict(list)
    for (block, site), tally in tallies.items():
        for name, value in zip(columns.get(block, []) if site is None else [], tally.utilisation, strict=site is None):
            by_name[name].append(value)
    found |= {f"utilisation/{name}": _mean(values) for name, values in by_name.items()}
    return {f"router/{name}": float(f"{float(value):.4g}") for name, value in found.items()}


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([value.cpu() for value in values]).mean()


def log_router(trainer: Trainer, adapter: str | None = None) -> RouterCallback:
    """Let a trainer's log, and whatever ``report_to`` names, show how the routers of its mixture decide.

    Call it between building the trainer and ``train()``. Figures are of the tokens that carry a loss, if batches have
    ``labels``, else of all text tokens; with several processes, of the first one's.

    Args:
        trainer: any transformers `Trainer`, TRL's among them. Its ``compute_loss`` is watched for the labels.
        adapter: whose routers; None: those of the one active adapter.

    Returns:
        What counts; its ``seen`` has the gates of every router by itself.

    Raises:
        ValueError: the trainer compiles the model. Watching breaks compiled blocks in pieces, which cannot run.

    Example:
        >>> trainer = SFTTrainer(model, args=SFTConfig(report_to="trackio"), peft_config=moa.preset("soft-moa"))
        >>> log_router(trainer)
        >>> trainer.train()
    """
    if trainer.args.torch_compile:
        raise ValueError(
            "log_router cannot look into a compiled model (torch_compile=True): train without the one or the other"
        )
    callback = RouterCallback(adapter)
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        callback.labels = inputs.get("labels")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched  # type: ignore[method-assign]
    # ahead of the trackers, which send on what is in the log when their turn comes
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
