"""What both pretraining scripts optimise with: Muon for the blocks' matrices, AdamW for the rest, one schedule."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz steps, for matrices (Jordan et al. 2024).

    `torch.optim.Muon` iterates in bfloat16, which a CPU without bfloat16 units only emulates; this one stays in
    float32, and processes of a group, if there is one, share the matrices among them.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix, grouped by shape so that the products are batched."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for params in shapes.values():
                updates = shared(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
                scale = max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def shared(moved: Tensor) -> Tensor:
    """`orthogonal` of every matrix, each computed by one process of the group."""
    if not dist.is_initialized():
        return orthogonal(moved)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    updates = torch.zeros_like(moved)
    updates[mine] = orthogonal(moved[mine])
    dist.all_reduce(updates)
    return updates


def orthogonal(m: Tensor) -> Tensor:
    """The nearest matrices `(n, rows, columns)` with singular values near one, in five steps."""
    wide = m.shape[1] <= m.shape[2]
    x = m if wide else m.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.mT


def optimizers(model: nn.Module, peak: dict[str, float], decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding and norms, at the learning rates ``peak``."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=peak["muon"], decay=decay),
        torch.optim.AdamW(others, lr=peak["adamw"], betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(progress: float, warmup: float, hold: float) -> float:
    """Factor of the peak learning rate at a progress in [0, 1]: warm up, hold, then fall to zero."""
    if progress < warmup:
        return progress / warmup + 1e-3
    return 1.0 if progress < hold else max(0.0, (1 - progress) / (1 - hold))
