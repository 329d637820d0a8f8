"""Rule-pair pricing: the program of a large model, with a certificate of how good the plan is.

A *column* is a choice of rules for one layer's heads that keeps to the limit of rules per layer. A linear program over
known columns gives every constraint a price; under these prices each layer finds its best columns by trying all sets
of ``limit`` rules exactly. Prices and the layers' best values make a Lagrangian bound: no plan can be better. When no
layer finds a new column, a small integer program picks one column per layer, and another one re-assigns heads among
the rules that the layers then use. Columns are kept from one goal to the next.

This is Dantzig and Wolfe's decomposition (1960); what is particular is that a layer is priced by enumeration.
"""

from __future__ import annotations

import itertools

import numpy as np

from moa.extras import extra
from moa.spans.search.program import Array, Choice, Program
from moa.spans.search.solution import Goal, Solution, coupling
from moa.spans.search.whole import solve_whole

with extra("search"):
    from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
    from scipy.sparse import csr_array

ROUNDS = 100
PICKED = 30  # columns of a layer that the integer program chooses from
SECONDS = 20.0  # for each integer program
PENALTY = 1e3  # of breaking a constraint by its whole size, in units of the objective


class Pricing:
    """A solver of one program for many goals.

    Args:
        program: the program.
        tolerance: relative gap that is good enough.
    """

    def __init__(self, program: Program, tolerance: float = 0.005) -> None:
        self.program, self.tolerance = program, tolerance
        layers, _, count = program.shape
        self.sets = np.array(list(itertools.combinations(range(count), min(program.limit, count))))
        self.columns: list[dict[bytes, Choice]] = [{} for _ in range(layers)]
        self._seed()

    def solve(self, goal: Goal) -> Solution | None:
        """The best plan found, with its bound; None if no plan meets the goal or none was found."""
        rows, ends = coupling(self.program, goal)
        scale = max(float(np.abs(self.program.losses[goal.objective]).sum(1).max(-1).sum()), 1e-300)
        cost = self.program.losses[goal.objective] / scale
        bound, prices, broken = self._generate(cost, rows, ends)
        if broken > 1e-7:
            return None
        found = self._reassign(goal, self._pick(cost, rows, ends, prices))
        return found and Solution(found.choice, found.value, min(bound * scale, found.value))

    def _generate(self, cost: Array, rows: Array, ends: Array) -> tuple[float, Array, float]:
        """Add columns until none helps; gives the bound, the last prices and by how much a constraint stays broken."""
        bound = -np.inf
        for _ in range(ROUNDS):
            master = self._master(cost, rows, ends)
            prices = np.maximum(-master.ineqlin.marginals, 0)
            value, fresh = self._price(cost + np.tensordot(prices, rows, 1))
            bound = max(bound, value - float(prices @ ends))
            if not fresh or master.fun - bound <= 0.1 * self.tolerance * abs(master.fun):
                break
        return bound, prices, float(master.x[-len(ends) :].max())

    def _seed(self) -> None:
        """Columns for a ladder of prices per kept token, for every objective: something feasible to begin with."""
        mean = self.program.shares.mean(0)
        for losses in self.program.losses:
            size = np.abs(losses).max()
            for price in size * np.array([0, *np.geomspace(1e-4, 10, 16)]):
                self._price(losses + price * mean)

    def _price(self, cost: Array) -> tuple[float, int]:
        """Every layer's best columns under ``cost`` join the pool; their total value and how many are new."""
        total, fresh = 0.0, 0
        for layer, own in enumerate(cost):
            values = own[:, self.sets].min(-1).sum(0)
            best = np.argpartition(values, min(3, len(values) - 1))[:3]
            total += values.min()
            for number in best:
                rules = self.sets[number]
                choice = rules[own[:, rules].argmin(1)]
                fresh += self.columns[layer].setdefault(choice.tobytes(), choice) is choice
        return float(total), fresh

    def _table(self, cost: Array, rows: Array) -> tuple[Array, Array, Choice]:
        """Cost (columns,), coupling coefficients (constraints, columns) and layer (columns,) of the pool."""
        costs, coefficients, layers = [], [], []
        for layer, pool in enumerate(self.columns):
            choices = np.stack(list(pool.values()))
            heads = np.arange(choices.shape[1])
            costs.append(cost[layer][heads, choices].sum(1))
            coefficients.append(rows[:, layer][:, heads, choices].sum(2))
            layers.append(np.full(len(choices), layer))
        return np.concatenate(costs), np.concatenate(coefficients, 1), np.concatenate(layers)

    def _master(self, cost: Array, rows: Array, ends: Array) -> OptimizeResult:
        costs, coefficients, layers = self._table(cost, rows)
        return linprog(
            np.concatenate([costs, np.full(len(ends), PENALTY)]),
            A_ub=np.concatenate([coefficients, -np.eye(len(ends))], 1),
            b_ub=ends,
            A_eq=_one_each(layers, len(cost), len(ends)),
            b_eq=np.ones(len(cost)),
            method="highs",
        )

    def _pick(self, cost: Array, rows: Array, ends: Array, prices: Array) -> Choice:
        """One column per layer, by an integer program over those with the least reduced cost."""
        costs, coefficients, layers = self._table(cost, rows)
        reduced = costs + prices @ coefficients
        pools = [np.flatnonzero(layers == layer) for layer in range(len(cost))]
        kept = np.concatenate([pool[np.argsort(reduced[pool])[:PICKED]] for pool in pools])
        result = milp(
            np.concatenate([costs[kept], np.full(len(ends), PENALTY)]),
            constraints=[
                LinearConstraint(np.concatenate([coefficients[:, kept], -np.eye(len(ends))], 1), -np.inf, ends),
                LinearConstraint(_one_each(layers[kept], len(cost), len(ends)), 1, 1),
            ],
            integrality=np.concatenate([np.ones(len(kept)), np.zeros(len(ends))]),
            bounds=Bounds(0, np.concatenate([np.ones(len(kept)), np.full(len(ends), np.inf)])),
            options={"mip_rel_gap": 0.2 * self.tolerance, "time_limit": SECONDS},
        )
        share = reduced[kept] * -1 if result.x is None else result.x[: len(kept)]
        everything = [choice for pool in self.columns for choice in pool.values()]
        best = [np.flatnonzero(layers[kept] == layer) for layer in range(len(cost))]
        return np.stack([everything[kept[places[share[places].argmax()]]] for places in best])

    def _reassign(self, goal: Goal, choice: Choice) -> Solution | None:
        """The best plan with the rules that each layer uses in ``choice``."""
        allowed = np.zeros((len(choice), len(self.program.rules)), dtype=bool)
        for layer, row in enumerate(choice):
            allowed[layer, row] = True
        return solve_whole(self.program, goal, tolerance=0.2 * self.tolerance, seconds=SECONDS, allowed=allowed)


def _one_each(layers: Choice, count: int, slack: int) -> csr_array:
    """Rows that sum every layer's columns; the last ``slack`` variables are in none."""
    columns = np.arange(len(layers))
    return csr_array((np.ones(len(layers)), (layers, columns)), shape=(count, len(layers) + slack))
