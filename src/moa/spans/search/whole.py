"""The whole integer program in HiGHS: exact, for models with few heads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moa.extras import extra
from moa.spans.search.program import Program
from moa.spans.search.solution import Goal, Solution, coupling

with extra("search"):
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array, hstack, identity, kron

INFEASIBLE = 2


def solve_whole(
    program: Program,
    goal: Goal,
    *,
    tolerance: float = 1e-9,
    seconds: float = 600.0,
    allowed: NDArray[np.bool_] | None = None,
) -> Solution | None:
    """Solve with one binary per head and rule, and one per layer and rule for the limit of rules per layer.

    Args:
        program: the program.
        goal: what to minimise, and the boxes.
        tolerance: relative gap at which HiGHS may stop.
        seconds: after these it must.
        allowed: (layers, rules) bool; the rules that a layer may use. None: all. The bound is one of what is allowed.

    Returns:
        None if HiGHS found no plan; there is none if it had the time.
    """
    layers, heads, count = program.shape
    cost = program.losses[goal.objective]
    scale = max(float(np.abs(cost).max()), 1e-300)
    may = np.ones((layers, count)) if allowed is None else allowed.astype(float)
    rows, ends = coupling(program, goal)
    chosen, used = layers * heads * count, layers * count
    one_rule = hstack([kron(identity(layers * heads), np.ones((1, count))), csr_array((layers * heads, used))])
    coupled = hstack([csr_array(rows.reshape(len(ends), -1)), csr_array((len(ends), used))])
    few_rules = hstack([csr_array((layers, chosen)), kron(identity(layers), np.ones((1, count)))])
    constraints = [
        LinearConstraint(one_rule, 1, 1),
        LinearConstraint(coupled, -np.inf, ends),
        LinearConstraint(few_rules, -np.inf, program.limit),
        LinearConstraint(_marks(layers, heads, count), -np.inf, 0),
    ]
    result = milp(
        np.concatenate([cost.ravel() / scale, np.zeros(used)]),
        constraints=constraints,
        integrality=np.ones(chosen + used),
        bounds=Bounds(0, np.concatenate([np.repeat(may[:, None], heads, 1).ravel(), np.ones(used)])),
        options={"mip_rel_gap": tolerance, "time_limit": seconds},
    )
    if result.x is None:
        return None
    # The solver's 0.9999999 is a 1: take the largest, never truncate.
    choice = result.x[:chosen].reshape(layers, heads, count).argmax(-1)
    value = float(program.loss(choice)[goal.objective])
    bound = value if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale
    return Solution(choice, value, min(bound, value))


def _marks(layers: int, heads: int, count: int) -> csr_array:
    """Rows ``x[l, h, r] - y[l, r] <= 0``."""
    here = np.arange(layers * heads * count)
    layer, rule = here // (heads * count), here % count
    values = np.concatenate([np.ones(len(here)), -np.ones(len(here))])
    columns = np.concatenate([here, len(here) + layer * count + rule])
    return coo_array((values, (np.concatenate([here, here]), columns))).tocsr()
