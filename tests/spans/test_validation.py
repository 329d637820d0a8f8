"""Validation: the plan with the lowest held-out loss, its evidence, resuming, bad input; and the report page."""

from __future__ import annotations

import copy
from html.parser import HTMLParser

import pytest
import torch

from moa.report.spans import write_report
from moa.spans import SpanPlan, apply_spans
from moa.spans.evidence.items import Item, answers_kept, response_loss
from moa.spans.evidence.validation import validate

FIELDS = {"sink": 8, "block": 8, "model": "some/model"}
PLANS = [SpanPlan.uniform(2, 2, density, **FIELDS) for density in (0.25, 0.5, 0.75)] + [SpanPlan.dense(2, 2, **FIELDS)]


@pytest.fixture(scope="module")
def items() -> list[Item]:
    ids = torch.randint(3, 259, (3, 96), generator=torch.Generator().manual_seed(0)).tolist()
    return [Item(tuple(row), tuple(place >= 80 for place in range(96))) for row in ids]


def test_lowest_loss_wins_and_is_recorded(tiny_llama, items):
    model = tiny_llama(initializer_range=0.3).eval()
    found = validate(model, PLANS, items, 96)
    with torch.no_grad():
        dense = sum(float(response_loss(model, item)) for item in items) / 3
        with apply_spans(model, PLANS[0]):
            first = sum(float(response_loss(model, item)) for item in items) / 3
    assert found.dense.loss == pytest.approx(dense)
    assert found.losses[0] == pytest.approx(first)
    assert found.losses[3] == pytest.approx(dense)
    assert found.losses[0] != pytest.approx(dense)
    assert found.losses[found.chosen] == min(found.losses)
    said = found.plan.searched["validation"]
    assert (said["length"], said["items"], said["chosen"]) == (96, 3, found.chosen)
    assert said["losses_of_all"] == found.losses
    # The densest candidate is dense, and so is a uniform plan of its density.
    assert said["uniform_loss"] == found.uniform.loss == pytest.approx(dense)
    assert validate(model, PLANS[:1], items, 96).uniform.loss == pytest.approx(first)
    assert [one.kv_density for one in found.measured] == [plan.kv_density(96) for plan in PLANS]
    assert "validation" not in PLANS[found.chosen].searched


def test_of_equal_losses_the_smaller_cache_wins(tiny_llama, items):
    model = tiny_llama().eval()
    with torch.no_grad():  # attention that adds nothing: every plan is as good as dense
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert validate(model, PLANS[::-1], items, 96).chosen == 3


def test_answers_are_counted_one_by_one(tiny_llama, items):
    """Two answers in every item, the model's own first tokens; a short span changes some of them."""
    model = tiny_llama(initializer_range=0.3).eval()
    own = []
    for item in items:
        row = torch.tensor([item.tokens])
        for place in (80, 81, 90, 91):
            with torch.no_grad():
                row[0, place] = model(row[:, :place]).logits[0, -1].argmax()
        own.append(Item(tuple(row[0].tolist()), tuple(place in (80, 81, 90, 91) for place in range(96))))
    found = validate(model, PLANS, own, 96)
    assert found.dense.accuracy == found.measured[3].accuracy == 1.0
    assert found.measured[0].accuracy in [n / 6 for n in range(6)]
    assert found.plan.searched["validation"]["accuracies_of_all"] == [one.accuracy for one in found.measured]
    assert answers_kept(own[0], torch.tensor([True, False, True, True])) == [False, True]


def test_the_uniform_candidate_is_measured_once(tiny_llama, items, monkeypatch):
    model, plans = tiny_llama().eval(), [copy.deepcopy(plan) for plan in PLANS[:2]]
    plans[1].searched["kind"] = "uniform"
    forwards = []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    found = validate(model, plans, items, 96)
    assert found.uniform == found.measured[1]
    assert len(forwards) == 3 * len(items)
    assert found.plan.searched["validation"]["kinds"] == [None, "uniform"]


def test_killed_run_goes_on(tiny_llama, items, tmp_path):
    model, file = tiny_llama().eval(), tmp_path / "validation.jsonl"
    whole = validate(model, PLANS, items, 96)

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(model, PLANS, items, 96, save_to=file, progress=kill)
    seen: list[int] = []
    again = validate(model, PLANS, items, 96, save_to=file, progress=lambda done, total: seen.append(done))
    assert seen[0] == 7
    assert again == whole
    with pytest.raises(ValueError, match="plans was"):
        validate(model, PLANS[:2], items, 96, save_to=file)


def test_bad_input(tiny_llama, items):
    model = tiny_llama().eval()
    with pytest.raises(ValueError, match="0 plans and 3 items"):
        validate(model, [], items, 96)
    with pytest.raises(ValueError, match="3 layers"):
        validate(model, [SpanPlan.dense(3, 2, **FIELDS)], items, 96)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="plan dense has a loss of nan on item 0"):
        validate(model, PLANS, items, 96)


class Page(HTMLParser):
    """Counts tags and refuses what would reach out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag not in ("script", "link", "img")
        assert not any(name in ("src", "href") for name, _ in attributes)


def test_report_page_shows_every_span_and_every_plan(tmp_path):
    plans = [SpanPlan.uniform(2, 3, density, **FIELDS) for density in (0.25, 0.5)]
    for place, plan in enumerate(plans):
        plan.searched = {
            "losses": {"64": 1.0 + place, "128": 3.0 - place},
            "kv_density": {"64": 0.5},
            "kind": ("searched", "uniform")[place],
        }
    plans[1].model = "<b>evil</b>"
    measured = {"dense_loss": 1.5, "loss": 1.25, "chosen": 1, "losses_of_all": [2, 1.25]}
    measured |= {"dense_accuracy": 1.0, "accuracy": 0.875, "accuracies_of_all": [0.625, 0.875]}
    measured |= {"uniform_loss": 1.75, "uniform_accuracy": 0.5, "uniform_kv_density": 0.5}
    plans[1].searched["validation"] = {"length": 160, "items": 2, "kv_density": 0.5} | measured
    text = write_report(tmp_path / "report.html", plans[1], plans, 160).read_text()
    page = Page(text)
    assert page.tags.count("circle") == 2
    assert text.count("80 tokens") == 6
    assert "<b>evil" not in text
    assert "1.2500 under the plan, 1.5000 dense" in text
    assert "62.5%" in text
    losses = {"losses_of_all": [9, 2, 1.25], "accuracies_of_all": [0, 0.625, 0.875], "chosen": 2}
    plans[1].searched["validation"] |= losses  # a plan without influence of its own was measured, too, as the first
    beside = write_report(tmp_path / "beside.html", plans[1], [SpanPlan.dense(2, 3, **FIELDS), *plans], 160).read_text()
    assert "plan 02: 2 and 2" in beside
    assert "02 (chosen)" in beside
    assert beside.index("01") < beside.index("2.0000") < beside.index("02 (chosen)") < beside.index("1.2500</td>")
    assert "9.0000" not in beside
    alone = write_report(tmp_path / "alone.html", SpanPlan.dense(1, 1), length=64).read_text()
    assert "not validated" in alone
    assert "circle" not in Page(alone).tags
