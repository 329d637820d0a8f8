"""`moa inspect`: numbers against computations that do not use its code, and a page that works for everybody."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, logits, perturb, seeded, tiny_config, tiny_moa
from tiny import tiny_tokenizer as letters
from torch.nn.functional import linear, silu
from typer.testing import CliRunner

import moa
from moa.adapters.block import Mixture
from moa.adapters.members import experts_of, mixtures_of
from moa.adapters.telemetry import Decisions, Place
from moa.cli import app
from moa.evaluation.models import Loaded
from moa.evaluation.sets import EvaluationSet
from moa.inspection import Inspection, inspect_adapter
from moa.inspection.collect import decisions_of, routers_of
from moa.inspection.contributions import outputs_of
from moa.inspection.similarity import linear_cka, mean_cosine, similarity
from moa.inspection.statistics import mean_entropy, statistics
from moa.inspection.summary import summary
from moa.report.inspection import write_report

ROWS = [
    {"instruction": f"{a} + {b} = ?", "input": "", "output": f"it is {a + b}", "answer": str(a + b)}
    for a, b in ((1, 2), (12, 30), (7, 7))
]


def texts(number: int = 3, length: int = 11) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(5, VOCABULARY, (length + n,), generator=draw).tolist() for n in range(number)]


def a_set(name: str = "sums", rows: list[dict[str, Any]] = ROWS) -> EvaluationSet:
    return EvaluationSet(name, "math", "number", None, 6, rows)


def inspected(model: Any, *sets: EvaluationSet, **options: Any) -> Inspection:
    loaded = Loaded(model, letters(), "tiny", "short")
    return inspect_adapter(loaded, sets or [a_set(), a_set("more", ROWS[:1])], adapter="mine", **options)


# Gates and their statistics


def test_statistics_are_those_of_gates_counted_by_hand():
    model = tiny_moa()
    facts = routers_of(model, "default")
    found = decisions_of(model, "default", texts())
    assert set(found) == set(facts) == {Place(b, s) for b in (0, 1) for s in (None, "down")}
    for place in facts:
        rows = []
        for text in texts():
            with moa.gate_values(model) as record, torch.no_grad():
                model(input_ids=torch.tensor([text]))
            gates = record.gates[place.block] if place.site is None else record.routes[place.block][place.site]
            rows += gates[0].tolist()
        got = statistics(place, facts[place], found[place])
        assert got.tokens == len(rows) == 36
        level = 0.0 if place.site is None else 0.5 / 3
        for column in range(len(got.columns)):
            values = [row[column] for row in rows]
            assert got.mean[column] == pytest.approx(sum(values) / len(rows), abs=1e-6)
            assert got.active[column] == pytest.approx(sum(value != 0 for value in values) / len(rows))
            assert got.used[column] == pytest.approx(sum(value > level for value in values) / len(rows))
            wins = sum(max(row) > 0 and row.index(max(row)) == column for row in rows)
            assert got.strongest[column] == pytest.approx(wins / len(rows))
        entropies = [
            -sum(v / sum(row) * math.log(v / sum(row)) for v in row if v > 0) / math.log(len(row))
            for row in rows
            if sum(row) > 0
        ]
        assert got.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-6)
        assert (got.threshold is None) == (place.site is not None)


def test_thresholds_are_averaged_over_tokens():
    model = tiny_moa()
    found = decisions_of(model, "default", texts())[Place(1, None)]
    seen = []
    for text in texts():
        with moa.gate_values(model) as record, torch.no_grad():
            model(input_ids=torch.tensor([text]))
        seen += record.thresholds[1].flatten().tolist()
    got = statistics(Place(1, None), routers_of(model, "default")[Place(1, None)], found).threshold
    assert got == pytest.approx((np.mean(seen), np.std(seen)), abs=1e-6)


def test_entropy_has_its_two_ends():
    assert mean_entropy(torch.tensor([[0.3, 0.3, 0.3]])) == pytest.approx(1)
    assert mean_entropy(torch.tensor([[0.0, 0.7]])) == pytest.approx(0)
    assert mean_entropy(torch.zeros(0, 3)) is None
    assert mean_entropy(torch.ones(4, 1)) is None


def test_a_closed_expert_is_named_dead_and_a_used_one_is_not():
    model = tiny_moa(moa.MoAConfig(experts=[moa.LoraExpert(targets=["q", "v"]), moa.ParallelExpert(size=4)]))
    (first, _) = mixtures_of(model)
    with torch.no_grad():
        first.moa_w2["default"].weight[1] = 0
        first.moa_w2["default"].bias[1] = -20
    found = inspected(model)
    assert found.dead == ["block 0: v"]
    assert summary(found).dead == 1
    assert "dead" in next(iter(re.findall(r"<td[^>]*block 0, v:[^>]*>(.*?)</td>", page_of(found))))


def test_silent_tokens_count_for_no_expert():
    facts = routers_of(tiny_moa(), "default")[Place(0, None)]
    gates = torch.zeros(4, len(facts.columns))
    gates[0, 2] = 0.5
    got = statistics(Place(0, None), facts, Decisions(gates, None))
    assert got.silent == 0.75
    assert got.strongest == [0, 0, 0.25, 0, 0]
    assert got.entropy == 0


def test_sets_and_their_pool():
    found = inspected(tiny_moa())
    assert [entry.name for entry in found.sets] == ["sums", "more"]
    assert [entry.rows for entry in found.sets] == [3, 1]
    assert found.pooled.tokens == sum(entry.tokens for entry in found.sets)
    for place, pooled in enumerate(found.pooled.routers):
        parts = [entry.routers[place] for entry in found.sets]
        mean = sum(np.array(part.mean) * part.tokens for part in parts) / pooled.tokens
        np.testing.assert_allclose(pooled.mean, mean, atol=1e-6)


# What experts put out


def caught(model: Any, block: int, text: list[int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Experts' outputs in one block, and what their hosts read, caught by hooks of this test."""
    mixture = mixtures_of(model)[block]
    layers = {layer.site: layer for layer in experts_of(mixture, "default")}
    reads: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for name, layer in layers.items():

        def read(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            reads.setdefault((name, x.shape[1]), x[0])

        handles.append(layer.host.register_forward_hook(read, with_kwargs=True))
    with torch.no_grad(), outputs_of(mixture, "default") as seen:
        model(input_ids=torch.tensor([text]), use_cache=False)
    outputs = {name: seen[name].output for name in layers}
    for handle in handles:
        handle.remove()
    # A prompt expert sends its few tokens through the same hosts.
    return outputs, {name: values for (name, tokens), values in reads.items() if tokens == len(text)}


def test_outputs_of_lora_and_parallel_are_their_formulas():
    model = tiny_moa()
    outputs, reads = caught(model, 1, texts()[0])
    layers = {layer.site: layer for layer in experts_of(mixtures_of(model)[1], "default")}
    for name in ("q", "v"):
        a, b = layers[name].moa_A["default"].weight, layers[name].moa_B["default"].weight
        torch.testing.assert_close(outputs[name].whole, reads[name] @ a.T @ b.T * 4)
    parallel, x = layers["parallel"], reads["parallel"]
    down, up = parallel.moa_down["default"], parallel.moa_up["default"]
    torch.testing.assert_close(
        outputs["parallel"].whole, linear(silu(linear(x, down.weight, down.bias)), up.weight, up.bias[0])
    )
    copies, x = layers["down"], reads["down"]
    route = torch.softmax(copies.mixture_copies.moa_w2["default"](x), -1)
    whole = 0
    for number, output in enumerate(outputs["down"].copies):
        rows = slice(2 * number, 2 * number + 2)
        a, b = copies.moa_A["default"].weight[rows], copies.moa_B["default"].weight[:, rows]
        torch.testing.assert_close(output, x @ a.T @ b.T * 4)
        whole = whole + route[:, number : number + 1] * output
    torch.testing.assert_close(outputs["down"].whole, whole)


def test_shared_copies_read_the_same_and_write_differently():
    shared = moa.LoraExpert(targets=["q"], r=2, copies=moa.Copies(3, shared=True))
    model = tiny_moa(moa.MoAConfig(experts=[shared], router=None))
    outputs, reads = caught(model, 0, texts()[0])
    (layer,) = experts_of(mixtures_of(model)[0], "default")
    low = reads["q"] @ layer.moa_A["default"].weight.T
    b = layer.moa_B["default"].weight
    for number, output in enumerate(outputs["q"].copies):
        torch.testing.assert_close(output, low @ b[:, 2 * number : 2 * number + 2].T * 4)


def test_a_prompt_expert_is_asked_ungated():
    """Its gated part is what the output projection of block 0 reads more than without the adapter."""
    model = tiny_moa(moa.MoAConfig(experts=[moa.PromptExpert(length=3)]))
    text = torch.tensor([texts()[0]])
    outputs, _ = caught(model, 0, texts()[0])
    read = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if args[0].shape[1] == text.shape[1]:  # and not the prompt's few tokens
            read.append(args[0][0])

    handle = mixtures_of(model)[0].host.self_attn.o_proj.register_forward_hook(keep)
    with torch.no_grad(), moa.gate_values(model) as record:
        model(input_ids=text)
        with model.disable_adapter():
            model(input_ids=text)
    handle.remove()
    gate = record.gates[0][0]
    torch.testing.assert_close(gate * outputs["prompt"].whole, read[0] - read[1], atol=1e-5, rtol=1e-4)


def test_rescaling_puts_out_what_it_changes():
    """Ungated: on k the projection's output times its factors, on down the change of what the projection reads."""
    model = tiny_moa(moa.MoAConfig(experts=[moa.Ia3Expert(targets=["k", "down"])]))
    changes = {
        layer.site: layer.moa_scale["default"].weight[0] for layer in experts_of(mixtures_of(model)[0], "default")
    }
    outputs, _ = caught(model, 0, texts()[0])
    block, plain = model.get_base_model().model.layers[0], {}
    for name, linear_layer in (("k", block.self_attn.k_proj), ("down", block.mlp.down_proj)):

        def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
            plain[name] = args[0][0], output[0]

        linear_layer.register_forward_hook(keep)
    with torch.no_grad(), moa.gate_values(model) as record:
        model(input_ids=torch.tensor([texts()[0]]))
    gates = dict(zip(record.columns[0], record.gates[0][0].unsqueeze(-1).unbind(1), strict=True))
    for site, now in (("ia3_k", plain["k"][1]), ("ia3_down", plain["down"][0])):
        before = now / (1 + gates[site] * changes[site])
        torch.testing.assert_close(outputs[site].whole, before * changes[site], atol=1e-5, rtol=1e-4)


def test_watching_leaves_no_trace():
    model = tiny_moa()
    before, keys = logits(model), list(model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    inspected(model)
    assert list(model.state_dict()) == keys
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(logits(model), before)


# Similarity


def song_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimate as Song et al. 2012 print it, equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    inner = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (inner - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_cka_is_the_published_estimate():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 7)) + 3
    y = x @ draw.normal(size=(7, 50)) + 2 * draw.normal(size=(40, 50))
    k, m = x @ x.T, y @ y.T
    expected = song_hsic(k, m) / math.sqrt(song_hsic(k, k) * song_hsic(m, m))
    assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected, abs=1e-10)


def test_cka_knows_equal_turned_unrelated_and_constant_outputs():
    with seeded(0):
        x = torch.randn(300, 20)
        turn = torch.linalg.qr(torch.randn(20, 20)).Q
        wide = torch.randn(2, 300, 2000)
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 5 * x @ turn - 2) == pytest.approx(1, abs=1e-6)
    assert abs(linear_cka(*wide)) < 0.02  # the biased estimate is above 0.8 here
    assert linear_cka(x, torch.full((300, 3), 0.1)) is None
    assert mean_cosine(x, -2 * x) == pytest.approx(-1)
    assert mean_cosine(x, torch.zeros_like(x)) is None


def copies_model(alike: bool) -> Any:
    copies = moa.LoraExpert(targets=["q", "down"], r=2, copies=moa.Copies(3))
    model = tiny_moa(moa.MoAConfig(experts=[copies, moa.ParallelExpert(size=4, copies=3)], router=None))
    with torch.no_grad():
        for mixture in mixtures_of(model) if alike else []:
            for layer in experts_of(mixture, "default"):
                if layer.site == "parallel":
                    down, up = layer.moa_down["default"], layer.moa_up["default"]
                    for wide in (down.weight, down.bias):
                        wide.copy_(torch.cat([wide[:4]] * 3))
                    up.weight.copy_(torch.cat([up.weight[:, :4]] * 3, 1))
                    up.bias.copy_(torch.cat([up.bias[:1]] * 3))
                else:
                    a, b = layer.moa_A["default"].weight, layer.moa_B["default"].weight
                    a.copy_(torch.cat([a[:2]] * 3))
                    b.copy_(torch.cat([b[:, :2]] * 3, 1))
    return model


@pytest.mark.parametrize("alike", [True, False])
def test_identical_copies_have_similarity_one_and_random_ones_less(alike: bool):
    found, tokens = similarity(copies_model(alike), "default", texts())
    assert tokens == 36
    between_copies = [entry for entry in found if entry.site is not None]
    assert {(entry.block, entry.site) for entry in between_copies} == {
        (block, site) for block in (0, 1) for site in ("q", "down", "parallel")
    }
    for entry in between_copies:
        cka, cosine = np.array(entry.cka), np.array(entry.cosine)
        np.testing.assert_allclose(np.diag(cka), 1, atol=1e-9)
        others = np.concatenate([cka[~np.eye(3, dtype=bool)], cosine[~np.eye(3, dtype=bool)]])
        if alike:
            np.testing.assert_allclose(others, 1, atol=1e-5)
        else:
            assert others.max() < 0.95


def test_matrices_are_in_the_order_of_their_names():
    model = copies_model(alike=True)
    (layer,) = [layer for layer in experts_of(mixtures_of(model)[1], "default") if layer.site == "q"]
    with torch.no_grad():
        layer.moa_A["default"].weight[2:4] += torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    (entry,) = [e for e in similarity(model, "default", texts())[0] if (e.block, e.site) == (1, "q")]
    assert entry.names == ["q/0", "q/1", "q/2"]
    for matrix in (np.array(entry.cka), np.array(entry.cosine)):
        assert matrix[0, 2] == pytest.approx(1, abs=1e-5)
        assert max(matrix[0, 1], matrix[2, 1]) < 0.95


def test_padding_and_company_change_no_similarity():
    model = tiny_moa()
    together, _ = similarity(model, "default", texts())
    outputs: dict[str, list[torch.Tensor]] = {}
    for text in texts():
        for name, output in caught(model, 1, text)[0].items():
            outputs.setdefault(name, []).append(output.whole)
    joined = {name: torch.cat(parts) for name, parts in outputs.items()}
    (entry,) = [entry for entry in together if entry.block == 1 and entry.site is None]
    assert entry.names == ["q", "v", "prompt", "down", "parallel"]
    expected = [[linear_cka(joined[left], joined[right]) for right in entry.names] for left in entry.names]
    np.testing.assert_allclose(np.array(entry.cka), np.array(expected), atol=1e-4)


def test_few_and_many_tokens():
    model = tiny_moa()
    assert similarity(model, "default", [[5, 6, 7]]) == ([], 0)
    found, tokens = similarity(model, "default", texts(50, 20))
    assert tokens == 512
    assert len(found) == 4


def test_an_untrained_adapter_has_nothing_to_compare():
    from tiny import tiny_llama

    model = get_peft_model(tiny_llama(), tiny_config()).eval()
    found, _ = similarity(model, "default", texts())
    assert {value for entry in found for row in entry.cka for value in row} == {None}


# Answers


def test_tokens_and_their_experts_are_those_of_the_gates():
    model = tiny_moa()
    found = inspected(model, a_set(), examples=2)
    assert len(found.examples) == 2
    tokenizer = letters()
    for shown in found.examples:
        prompt = tokenizer(shown.prompt)["input_ids"]
        answer = [tokenizer.convert_tokens_to_ids(token) for token in shown.tokens]
        with moa.gate_values(model) as record, torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        assert scores[len(prompt) - 1].argmax() == answer[0]  # it is what the model writes
        entries = {(entry.block, entry.site): entry for entry in shown.strongest}
        assert set(entries) == {(None, None), (0, None), (0, "down"), (1, None), (1, "down")}
        for (block, site), entry in entries.items():
            gates = (
                sum(record.gates.values()) / 2
                if block is None
                else record.gates[block]
                if site is None
                else record.routes[block][site]
            )[0, len(prompt) :]
            for token, (name, gate) in enumerate(zip(entry.names, entry.gates, strict=True)):
                best = int(gates[token].argmax())
                assert gate == pytest.approx(float(gates[token, best]), abs=1e-6)
                assert name == (record.experts[best] if site is None else f"down/{best}")


def test_colours_of_the_page_follow_the_gates():
    found = inspected(tiny_moa(), a_set(), examples=1)
    (shown,) = found.examples
    marks = re.findall(r'<ruby (?:class="c(\d)" )?title="([^"]*)">(.*?)<rt>(.*?)</rt>', page_of(found))
    assert len(marks) == len(shown.tokens)
    for (colour, title, _, name), expected, gate in zip(
        marks, shown.strongest[0].names, shown.strongest[0].gates, strict=True
    ):
        assert name == expected
        assert int(colour) == found.experts.index(expected)
        assert title == f"{expected}, gate {gate:.2f}"


# The page


class Structure(HTMLParser):
    """Nesting, ids, references and what a page would load."""

    VOID = ("meta", "br", "wbr", "link", "img", "input", "hr", "path", "circle")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.loads: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.unreachable: list[str] = []
        self.headings: list[int] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object"):
            self.loads.append(tag)
        self.loads += [key for key in given if key.startswith("on") or key in ("src", "srcset")]
        if "id" in given:
            self.ids.append(str(given["id"]))
        self.refers += str(given.get("aria-labelledby") or "").split()
        if tag == "a":
            assert str(given["href"]).startswith("#"), given
            self.refers.append(str(given["href"])[1:])
        if tag == "table":
            self.tables.append({"caption": False, "bare": 0, "colour_only": 0})
        if tag == "caption":
            self.tables[-1]["caption"] = True
        if tag == "th" and given.get("scope") not in ("col", "row"):
            self.tables[-1]["bare"] += 1
        if given.get("class") == "scroll" and given.get("tabindex") != "0":
            self.unreachable.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag


def page_of(*found: Inspection) -> str:
    with tempfile.TemporaryDirectory() as folder:
        page, _ = write_report(Path(folder) / "page.html", found)
        return page.read_text(encoding="utf-8")


ODD = moa.MoAConfig(
    experts=[moa.LoraExpert(targets=["q"], layers=[1], copies=2), moa.ParallelExpert(size=4, layers=[1])]
)
WITHOUT_ROUTER = moa.MoAConfig(experts=[moa.LoraExpert(), moa.ParallelExpert(size=4)], router=None)
IA3 = moa.MoAConfig(experts=[moa.Ia3Expert(), moa.LoraExpert(targets=["q"], r=2)], gating="topk")


@pytest.mark.parametrize("configs", [[None], [ODD], [WITHOUT_ROUTER], [IA3], [None, ODD]])
def test_pages_are_whole_accessible_and_offline(configs: list[moa.MoAConfig | None]):
    found = [inspected(tiny_moa(config), a_set("a <b> & 'c'")) for config in configs]
    page = page_of(*found)
    seen = Structure(page)
    assert seen.open == []
    assert seen.loads == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert len(seen.ids) == len(set(seen.ids))
    assert set(seen.refers) <= set(seen.ids)
    assert seen.tables
    assert all(table["caption"] and not table["bare"] for table in seen.tables)
    assert not seen.unreachable
    assert seen.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(seen.headings, seen.headings[1:], strict=False))
    assert "<b>" not in page
    assert not re.search(r"<t[dh][^>]*></t[dh]>", page)  # a number or a sign in every cell: colour is never alone


def luminance(colour: tuple[float, ...]) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2, "contrast ratio"."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_tint_in_light_and_dark():
    page = page_of(inspected(tiny_moa()))
    share = float(re.findall(r"calc\(var\(--tint, 0\) \* ([.\d]+)\)", page)[-1])
    blocks = re.findall(r":root \{(.*?)\}", page)
    light, dark = ({}, {})
    for values in (blocks[0], blocks[2]):
        light.update(re.findall(r"--(\w+): ([^;]+);", values))
    for values in (blocks[1], blocks[3]):
        dark.update(re.findall(r"--(\w+): ([^;]+);", values))
    for mode in (light, dark):
        ink, paper = (tuple(bytes.fromhex(mode[name][1:])) for name in ("ink", "paper"))
        heat = tuple(float(part) for part in mode["heat"].split(","))
        for tint in np.linspace(0, 1, 21):
            mixed = tuple(h * tint * share + p * (1 - tint * share) for h, p in zip(heat, paper, strict=True))
            assert contrast(ink, mixed) >= 4.5
        for number in range(8):
            assert contrast(ink, tuple(bytes.fromhex(mode[f"c{number}"][1:]))) >= 4.5


def test_adapters_without_gates_and_blocks_without_experts_are_named():
    bare = inspected(tiny_moa(WITHOUT_ROUTER))
    assert bare.gating is None
    assert bare.pooled.routers == []
    assert bare.similarity
    assert "has no router over its experts" in page_of(bare)
    odd = inspected(tiny_moa(ODD))
    assert odd.bare == [0]
    page = page_of(odd)
    assert "Without experts:</strong> block 0." in page
    assert "block 0 has no experts under a router" in page


# The command


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_llama: Callable) -> dict[str, Path]:
    """Saved adapters on the tiny base."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "mixed": tiny_config(),
        "copies": moa.MoAConfig(experts=[moa.LoraExpert(targets=["q"], r=2, copies=2)], router=None),
        "plain": LoraConfig(r=2, target_modules=["q_proj"]),
    }
    for name, config in configs.items():
        base = tiny_llama()
        base.name_or_path = base.config._name_or_path = str(tiny_base)
        perturb(get_peft_model(base, config)).save_pretrained(folder / name)
    return {name: folder / name for name in configs}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_writes_page_and_numbers(adapters: dict[str, Path], tiny_rows: Path, tmp_path: Path):
    page = tmp_path / "new" / "page.html"
    done = run(
        adapters["mixed"],
        "--data",
        tiny_rows,
        "--limit",
        3,
        "--max-new-tokens",
        8,
        "--output",
        page,
        "--against",
        adapters["copies"],
    )
    assert done.exit_code == 0, done.output
    assert "Mean gate of each expert" in done.output
    mixed, copies = json.loads(page.with_suffix(".json").read_text())["inspections"]
    assert mixed["experts"] == ["q", "v", "prompt", "down", "parallel"]
    assert mixed["pooled"]["rows"] == copies["pooled"]["rows"] == 3
    assert mixed["pooled"]["tokens"] == copies["pooled"]["tokens"]
    assert copies["gating"] is None
    assert {router["site"] for router in copies["pooled"]["routers"]} == {"q"}
    text = page.read_text()
    assert Structure(text).open == []
    assert f"block 1, v: mean gate {mixed['pooled']['routers'][2]['mean'][1]:.3f}" in text
    assert text.count("<article") == 2


def test_the_same_command_gives_the_same_page(adapters: dict[str, Path], tiny_rows: Path, tmp_path: Path):
    pages = []
    for name in ("one.html", "two.html"):
        arguments = ("--data", tiny_rows, "--limit", 2, "--max-new-tokens", 8, "--output", tmp_path / name)
        done = run(adapters["mixed"], *arguments)
        assert done.exit_code == 0
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]


def test_mistakes_are_named(adapters: dict[str, Path], tiny_rows: Path, tmp_path: Path):
    empty, chat, long = (tmp_path / f"{name}.jsonl" for name in ("empty", "chat", "long"))
    empty.write_text("")
    chat.write_text(json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}) + "\n")
    long.write_text(json.dumps({"instruction": "x" * 2000, "output": "y"}) + "\n")
    for arguments, message in [
        ((adapters["plain"], "--data", tiny_rows), "of the PEFT method 'LORA', not a Mixture of Adapters"),
        ((tmp_path / "nowhere", "--data", tiny_rows), "there is no adapter"),
        ((adapters["mixed"], "--data", empty), "the data set is empty"),
        ((adapters["mixed"], "--data", chat), "a chat needs a chat template, and this tokenizer has none"),
        ((adapters["mixed"], "--data", long), "none of the 1 rows fits into the model's context of 512 tokens"),
        ((adapters["mixed"], "--data", tiny_rows, "--output", tmp_path / "page.pdf"), "must end in .html"),
    ]:
        done = run("--output", tmp_path / "page.html", *arguments)
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.output.split())
    assert not (tmp_path / "page.html").exists()


def test_gates_that_are_not_numbers_are_no_statistics():
    model = tiny_moa()
    with torch.no_grad():
        mixtures_of(model)[1].moa_w2["default"].bias[0] = math.nan
    with pytest.raises(ValueError, match="router of block 1 puts out gates that are not finite"):
        inspected(model)


def test_a_model_without_a_mixture_is_refused(tiny_llama: Callable):
    with pytest.raises(ValueError, match="no Mixture of Adapters"):
        inspected(tiny_llama())
    assert not any(isinstance(module, Mixture) for module in tiny_llama().modules())
