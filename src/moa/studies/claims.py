"""What a study is to decide, written down before it runs: one method, its rivals, and the claim in words."""

from __future__ import annotations

from dataclasses import field

from moa.choices import check_choice, nearest
from moa.settings import Several, settings
from moa.studies.methods import whole


@settings
class Claim:
    """``better`` is better than every one of ``than`` at every budget.

    Attributes:
        better: the reference method; its name in ``methods``.
        than: names of its rivals.
        text: the claim in words, for the page.
        budgets: where it is to hold; at all budgets of the study if empty.
        metric: what decides it; the study's first metric if empty.
    """

    better: str = ""
    than: Several[str] = field(default_factory=list)
    text: str = ""
    budgets: Several[float] = field(default_factory=list)
    metric: str = ""

    def __post_init__(self) -> None:
        self.budgets = [whole(budget) for budget in self.budgets]
        self.text = self.text or f"{self.better} is better than {', '.join(map(str, self.than))}."

    def check(self, methods: list[str], budgets: list[float], metrics: list[str]) -> None:
        """Raise ValueError unless the claim is about methods, budgets and metrics of the study."""
        check_choice("claims: better", self.better, methods)
        if not self.than:
            raise ValueError(f"the claim about {self.better!r} names no rival in 'than'")
        for rival in self.than:
            if rival not in methods:
                raise ValueError(f"claims: than={rival!r} is not one of {methods}{nearest(rival, methods)}")
        if self.better in self.than:
            raise ValueError(f"claims: {self.better!r} cannot be better than itself")
        for budget in self.budgets:
            if budget not in budgets:
                raise ValueError(f"claims: budgets names {budget}, but the study has {budgets}")
        if self.metric:
            check_choice("claims: metric", self.metric, metrics)
