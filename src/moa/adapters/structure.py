"""Finding the parts of a decoder block in its modules: by their names, and by shapes where a name is not enough.

What is found is a path for each role, or a reason if the block certainly has none. Where neither is sure the role is
left open, and whoever needs it has to be told: see `moa.adapters.placement`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from moa import _hosts
from moa.adapters.architectures import ROLES, find_module, linear_size
from moa.adapters.attention_interface import uses_interface

QUERY = ("q_b_proj", "q_proj", "query", "query_proj", "q_lin", "wq", "Wq")
KEY = ("k_proj", "key", "key_proj", "k_lin", "wk", "Wk")
VALUE = ("v_proj", "value", "value_proj", "v_lin", "wv", "Wv")
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
LATENT = "kv_b_proj"
OUTPUT = ("o_proj", "out_proj", "o_b_proj", "dense", "c_proj", "Wo", "wo", "out_lin")
DOWN = ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "fc_out", "proj_down", "Wo", "wo", "lin2", "output_linear")
UP = ("up_proj", "fc1", "c_fc", "w3", "dense_h_to_4h", "fc_in", "proj_up", "Wi", "lin1", "input_linear")
GATE = ("gate_proj", "w1", "proj_up_gate")
GATE_UP = "gate_up_proj"
FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "mlp_block")
CROSS = ("encoder_attn", "cross_attn", "crossattention", "cross_attention")


@dataclass
class Finding:
    """What was found in one block: paths by role, and reasons for roles that are certainly not there."""

    paths: dict[str, str] = field(default_factory=dict)
    layout: str | None = None
    absent: dict[str, str] = field(default_factory=dict)


def find_parts(block: nn.Module, hidden_size: int) -> Finding:
    """Everything that can be told of ``block``, whose tokens are ``hidden_size`` wide."""
    finding = Finding()
    _find_attention(block, finding)
    if finding.paths or not crosses(block):
        _find_feed_forward(block, finding, hidden_size)
    else:
        finding.absent = dict.fromkeys(ROLES, "it attends to another model's features and runs only if there are any")
    return finding


def attends(block: nn.Module) -> bool:
    """Whether the block attends to its own tokens."""
    return bool(_attention_owners(block))


def crosses(block: nn.Module) -> bool:
    """Whether the block attends to another model's output."""
    return any(_is_cross(name) for name, _ in _parts(block))


def describe(block: nn.Module) -> str:
    """The block's linear layers with their sizes, for messages."""
    return ", ".join(f"{path} ({size[0]} -> {size[1]})" for path, size in _linears(block)) or "no linear layer"


def _find_attention(block: nn.Module, finding: Finding) -> None:
    owners = _attention_owners(block)
    if not owners:
        finding.absent |= dict.fromkeys(("q", "k", "v", "o", "attention"), "it has no attention")
    if len(owners) != 1:
        return
    owner = owners[0]
    attention = _calls_interface(block, owner) or owner
    module = block.get_submodule(owner)
    paths = {"attention": attention}
    fused = _linear(module, FUSED)
    if fused is not None:
        paths |= dict.fromkeys(("q", "k", "v"), _join(owner, fused))
    else:
        latent = _linear(module, (LATENT,))
        for role, names in (("q", QUERY), ("k", KEY), ("v", VALUE)):
            path = _linear(module, names) or (latent if role != "q" else None)
            if path is not None:
                paths[role] = _join(owner, path)
        finding.layout = "latent" if latent is not None else None
    output = _output_projection(block, owner, attention, set(paths.values()))
    if output is not None:
        paths["o"] = output
    _explain_missing(block, attention, paths, finding)
    finding.paths |= paths


def _attention_owners(block: nn.Module) -> list[str]:
    """Paths of the modules that own the projections of self-attention."""
    owners = []
    for name, module in _parts(block):
        if not name or _is_cross(name):
            continue
        query, output = _linear(module, QUERY), _linear(module, OUTPUT)
        others = _linear(module, KEY) or _linear(module, (LATENT,)) or output
        if _linear(module, FUSED) or (query and others):
            owners.append(name)
    return owners


def _calls_interface(block: nn.Module, owner: str) -> str | None:
    """The nearest module around ``owner``, itself included, that calls transformers' attention interface."""
    while owner:
        module = find_module(block, owner)
        if module is not None and uses_interface(module):
            return owner
        owner = owner.rpartition(".")[0]
    return None


def _output_projection(block: nn.Module, owner: str, attention: str, taken: set[str]) -> str | None:
    """In the owner of the projections, around it, or in a module ``output`` beside it (BERT)."""
    around = owner.rpartition(".")[0]
    for place in (owner, attention, _join(around, "output")):
        module = find_module(block, place)
        path = None if module is None else _linear(module, OUTPUT)
        if path is not None and _join(place, path) not in taken:
            return _join(place, path)
    return None


def _explain_missing(block: nn.Module, attention: str, paths: dict[str, str], finding: Finding) -> None:
    """A projection is certainly absent if no linear layer of the attention is left that could be it."""
    inputs = {_input_of(block, path) for role, path in paths.items() if role != "attention"}
    linears = {_join(attention, path): size for path, size in _linears(block.get_submodule(attention))}
    if any(size[0] in inputs for path, size in linears.items() if path not in paths.values()):
        return
    for role in ("q", "k", "v", "o"):
        if role not in paths:
            finding.absent[role] = f"its attention has no {role} projection of its own"


def _find_feed_forward(block: nn.Module, finding: Finding, hidden: int) -> None:
    place = finding.paths.get("attention", "").rpartition(".")[0]
    taken = {path for role, path in finding.paths.items() if role != "attention"}
    while True:
        if _find_feed_forward_in(block, place, taken, finding, hidden):
            return
        if not place:
            break
        place = place.rpartition(".")[0]
    finding.absent |= dict.fromkeys(("gate", "up", "down", "mlp"), "it has no feed-forward module")


def _find_feed_forward_in(block: nn.Module, place: str, taken: set[str], finding: Finding, hidden: int) -> bool:
    """Look among the children of the module at ``place``; True if there is nothing more to look for."""
    level = block.get_submodule(place)
    attention = finding.paths.get("attention")
    candidates = []
    for name, child in level.named_children():
        path = _join(place, name)
        used = any(f"{one}.".startswith(f"{path}.") for one in (attention, *taken) if one is not None)
        if used or not _may_be_feed_forward(name):
            continue
        if linear_size(child) is None and _is_feed_forward(child):
            candidates.append(path)
    preferred = [path for name in FEED_FORWARD for path in candidates if path.rpartition(".")[2] == name]
    if candidates and (len(candidates) == 1 or preferred):
        mlp = (preferred or candidates)[0]
        finding.paths["mlp"] = mlp
        _find_projections(block.get_submodule(mlp), mlp, finding, hidden)
        return True
    if candidates:
        return True  # several, and no name that tells: left open
    return _find_inline(level, place, taken, finding)


def _find_projections(mlp: nn.Module, path: str, finding: Finding, hidden: int) -> None:
    up, down = _linear(mlp, UP), _linear(mlp, DOWN)
    if up is None or down is None:
        up, down = _by_shape(mlp, hidden, up, down)
    if _linear(mlp, (GATE_UP,)) is not None:
        finding.paths |= {"gate": _join(path, GATE_UP), "up": _join(path, GATE_UP)}
    elif up is not None and down is not None:
        gate = _linear(mlp, GATE)
        if gate is not None:
            finding.paths["gate"] = _join(path, gate)
        if _output_of(mlp, up) == _input_of(mlp, down):  # otherwise gate and up in one, in an order that nobody said
            finding.paths["up"] = _join(path, up)
            if gate is None:
                finding.absent["gate"] = "its feed-forward module has no gate projection"
    if down is not None:
        finding.paths["down"] = _join(path, down)
    elif _has_experts(mlp):
        stacked = any(parameter.dim() == 3 for parameter in mlp.parameters())
        why = "are stacked 3-D parameters, not linear layers" if stacked else "are one set of layers for each expert"
        finding.absent |= dict.fromkeys(("gate", "up", "down"), f"the weights of its feed-forward experts {why}")


def _by_shape(mlp: nn.Module, hidden: int, up: str | None, down: str | None) -> tuple[str | None, str | None]:
    """The two linear layers of a feed-forward module that has no others, whatever they are called."""
    linears = [(name, size) for name, child in mlp.named_children() if (size := linear_size(child)) is not None]
    if len(linears) != 2 or _has_experts(mlp):
        return up, down
    (first, one), (second, two) = linears
    return (first, second) if one[0] == two[1] == hidden and one[1] == two[0] else (up, down)


def _find_inline(level: nn.Module, place: str, taken: set[str], finding: Finding) -> bool:
    """A feed-forward part whose layers the block calls itself (OPT), or in two modules in a row (BERT)."""
    for up, down in (("fc1", "fc2"), ("intermediate.dense", "output.dense")):
        found = [find_module(level, name) for name in (up, down)]
        if any(module is None or linear_size(module) is None for module in found) or _join(place, down) in taken:
            continue
        first, last = _join(place, up), _join(place, down)
        finding.paths |= {"up": first, "down": last, "mlp": f"{first}..{last}"}
        finding.absent["gate"] = "its feed-forward layers have no gate projection"
        return True
    return False


def _may_be_feed_forward(name: str) -> bool:
    if name.startswith("mixture"):  # a router, attached before
        return False
    return "norm" not in name.lower() and name not in ("intermediate", "output") and not _is_cross(name)


def _is_feed_forward(module: nn.Module) -> bool:
    if _has_experts(module):
        return True
    linears = [name for name, child in module.named_children() if linear_size(child) is not None]
    return any(name in DOWN for name in linears) or (isinstance(module, nn.Sequential) and len(linears) == 2)


def _has_experts(module: nn.Module) -> bool:
    """Whether tokens are sent to some of many experts here, whose weights are stacked or in modules of their own."""
    return any(
        name.rpartition(".")[2] == "experts" or "expert" in type(part).__name__.lower()
        for name, part in module.named_modules()
        if "mixture" not in name
    )


def _parts(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The block and the modules in it, but for linear layers' insides and what adapters have attached."""
    yield prefix, block
    for name, child in block.named_children():
        if not name.startswith("mixture") and name != "experts" and linear_size(child) is None:
            yield from _parts(child, _join(prefix, name))


def _linears(module: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """Linear layers in ``module`` with their sizes."""
    found = []
    for path, part in _parts(module):
        for name, child in part.named_children():
            size = None if name.startswith("mixture") else linear_size(child)
            if size is not None:
                found.append((_join(path, name), size))
    return found


def _linear(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that is a linear layer of ``module``, or a module around nothing but one."""
    for name in names:
        child = _hosts.children(module).get(name)
        if child is None:
            continue
        if linear_size(child) is not None:
            return name
        inner = _linears(child)
        if len(inner) == 1 and not list(child.parameters(recurse=False)):
            return _join(name, inner[0][0])
    return None


def _input_of(module: nn.Module, path: str) -> int | None:
    size = linear_size(module.get_submodule(path))
    return None if size is None else size[0]


def _output_of(module: nn.Module, path: str) -> int | None:
    size = linear_size(module.get_submodule(path))
    return None if size is None else size[1]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_cross(name: str) -> bool:
    return any(part in CROSS for part in name.lower().split("."))
