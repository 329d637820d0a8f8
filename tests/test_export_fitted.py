"""`moa export --to lora` of a mixture with gates: a LoRA that is near it, and the truth about how near."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from families import build_family
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logits, perturb, seeded, tiny_config, tiny_llama, tiny_moa, tiny_tokenizer, tokens
from typer.testing import CliRunner

import moa
from moa.cli import app
from moa.integrations.fitted_lora import Start, _of_rank, fit_lora, save
from moa.integrations.gap import Gap

ROWS = [
    {"instruction": f"{a} + {b} = ?", "output": f"it is {a + b}", "answer": str(a + b)}
    for a in range(12)
    for b in range(5)
]
CONSTANT = {
    "two on one site": {"experts": [moa.LoraExpert(["q", "down"], r=2), moa.LoraExpert(["q"], r=3, alpha=5)]},
    "copies": {"experts": [moa.LoraExpert(["q", "v", "up"], r=2, copies=3)]},
    "copies share A": {"experts": [moa.LoraExpert(["q", "o"], r=2, alpha=6, copies=moa.Copies(3, shared=True))]},
    "one gate": {"experts": [moa.LoraExpert(["q", "down"], r=2, gate="all"), moa.LoraExpert(["v"], r=2)]},
    "copies alone": {"experts": [moa.LoraExpert(["k", "o"], r=3, copies=2)], "router": None},
    "some blocks": {"experts": [moa.LoraExpert(["q"], r=2, layers=[1]), moa.LoraExpert(["down"], r=1, layers=[0])]},
}


def constant(model):
    """Routers that do not look at the token: what is left are numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moa_w" in name and name.endswith("weight"):
                parameter.zero_()
    return model.eval()


def fit(model, **settings):
    return fit_lora(model, tiny_tokenizer(), ROWS, template="none", **{"steps": 0, "rank": 16, **settings})


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_gates_are_lora_without_any_fit(name):
    config = moa.MoAConfig(**{"gating": "soft", "router": moa.Router(hidden_per_expert=0, bias=True), **CONSTANT[name]})
    model = constant(perturb(get_peft_model(tiny_llama(), config)))
    expected, base = logits(model), logits(tiny_llama())
    student, gap = fit(model)
    assert (expected - base).abs().max() > 0.1
    assert (logits(student) - expected).abs().max() < 1e-4
    assert gap.agreement == gap.same_answers == 1
    assert gap.lora_loss == pytest.approx(gap.loss, abs=1e-4)
    assert abs(gap.base_loss - gap.loss) > 1e-3


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_parts_of_fused_projections(family):
    config = moa.MoAConfig(
        experts=[moa.LoraExpert(["q", "v"], r=2), moa.LoraExpert(["o"], r=2)],
        gating="soft",
        router=moa.Router(hidden_per_expert=0, bias=True),
    )
    model = constant(perturb(get_peft_model(build_family(family), config)))
    expected = logits(model, input_ids=tokens())
    with pytest.warns(UserWarning, match="fan_in_fan_out") if family == "gpt2" else no_warning():
        student, _ = fit(model)
    assert (logits(student, input_ids=tokens()) - expected).abs().max() < 1e-4 * expected.abs().max()
    untouched = logits(build_family(family), input_ids=tokens())
    assert (expected - untouched).abs().max() > 1e-3 * expected.abs().max()


def no_warning():
    from contextlib import nullcontext

    return nullcontext()


def test_a_rank_that_is_too_small_keeps_the_best_of_it():
    with seeded(0):
        start = Start(torch.randn(6, 20), torch.randn(9, 6))
    cut = _of_rank(start, 4)
    assert (cut.a.shape, cut.b.shape) == ((4, 20), (9, 4))
    whole = start.b @ start.a
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(cut.b @ cut.a, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-4, atol=1e-4)
    room = _of_rank(start, 8)
    torch.testing.assert_close(room.b @ room.a, whole)
    assert room.a[6:].abs().min() > 0


def soft(scale=0.15):
    """Prompts, a parallel adapter and gates that choose."""
    config = tiny_config(
        gating="soft", experts=[moa.LoraExpert(["q", "v"], r=2), moa.ParallelExpert(size=4), moa.PromptExpert(length=3)]
    )
    model = get_peft_model(tiny_llama(), config).eval()
    with seeded(3), torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moa_" in name:
                parameter.copy_(torch.randn(parameter.shape) * scale)
    return model


def test_the_fit_learns_what_the_mean_leaves_out():
    _, start = fit(soft(), rank=8)
    student, gap = fit(soft(), rank=8, steps=60)
    base_gap = abs(start.base_loss - start.loss)
    assert base_gap > 0.02
    assert abs(gap.lora_loss - gap.loss) < 0.3 * base_gap
    assert gap.agreement > start.agreement
    assert 0 < gap.agreement <= 1
    assert {name.rpartition(".")[2] for name in student.peft_config["default"].target_modules} >= {"up_proj", "o_proj"}


def test_the_same_seed_gives_the_same_lora():
    one, first = fit(soft(), rank=4, steps=5)
    two, second = fit(soft(), rank=4, steps=5)
    assert first == second
    assert torch.equal(logits(one), logits(two))


def test_the_default_rank_spends_what_the_mixture_has():
    model = soft()
    own = sum(p.numel() for name, p in model.named_parameters() if ".moa_" in name)
    student, gap = fit(model, rank=None)
    spent = sum(p.numel() for name, p in student.named_parameters() if "lora_" in name)
    assert 0.5 * own < spent <= own
    assert gap.rank == student.peft_config["default"].r


def test_the_base_is_left_as_it_was():
    student, _ = fit(soft(), steps=3)
    assert torch.equal(logits(student.unload()), logits(tiny_llama()))


def test_what_is_written_loads_and_merges(tmp_path):
    student, gap = fit(soft(), steps=5)
    save(student, gap, tmp_path)
    assert json.loads((tmp_path / "gap.json").read_text()) == dataclasses.asdict(gap)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert isinstance(loaded.active_peft_config, LoraConfig)
    assert torch.equal(logits(loaded), logits(student))
    assert (logits(loaded.merge_and_unload()) - logits(student)).abs().max() < 1e-4


def test_a_gap_above_the_bound_is_refused_with_the_numbers():
    gap = Gap(1.0, 1.2, 2.0, 0.9, 0.5, 20, 8)
    gap.check(0.2 + 1e-9, 0.9)
    with pytest.raises(
        ValueError, match=r"loss 1.2000 against the mixture's 1.0000 \(base 2.0000\), 90.0%.*--max-loss-gap"
    ):
        gap.check(0.1, 0.9)
    with pytest.raises(ValueError, match="95% of its tokens"):
        gap.check(0.3, 0.95)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match=r"5 rows .* too few"):
        fit_lora(tiny_moa(), tiny_tokenizer(), ROWS[:5], template="none")
    with pytest.raises(ValueError, match="rank"):
        fit(tiny_moa(), rank=0)
    model = tiny_moa()
    model.add_adapter("second", tiny_config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active are \['default', 'second'\]"):
        fit(model)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_base, tiny_rows, tmp_path_factory):
    from moa.training.recipe import Recipe
    from moa.training.sft import train

    settings = {"base": str(tiny_base), "data": {"train": [str(tiny_rows)], "template": "short"}, "max_steps": 4}
    recipe = tmp_path_factory.mktemp("run") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings | {"output": str(recipe.parent / "out")}))
    return train(Recipe.load(recipe))


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_says_what_it_leaves_out(adapter, tiny_base, tmp_path):
    planned = shutil.copytree(adapter, tmp_path / "planned")
    moa.SpanPlan.dense(2, 2).save(planned / "spans.json")
    rows = [{"instruction": f"{n}" * (2000 if n == 1 else 1), "output": "x"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loose = ("--steps", 0, "--max-loss-gap", 100, "--min-agreement", 0, "--data", tmp_path / "rows.jsonl")
    done = export(planned, "--output", tmp_path / "lora", *loose)
    assert done.exit_code == 0, done.output
    assert "was trained under a span plan, which a LoRA does not carry" in " ".join(done.output.split())
    assert "1 of 30 rows are longer than the model's context" in " ".join(done.output.split())


def test_the_command_fits_on_the_training_data_and_says_the_gap(adapter, tiny_base, tmp_path):
    done = export(adapter, "--output", tmp_path / "lora", "--steps", 5, "--max-loss-gap", 5, "--min-agreement", 0)
    assert done.exit_code == 0, done.output
    assert "held-out rows: answer loss" in " ".join(done.output.split())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(tiny_base))


def test_the_command_writes_nothing_that_is_too_far(adapter, tmp_path):
    done = export(adapter, "--output", tmp_path / "lora", "--steps", 0, "--min-agreement", 1, "--max-loss-gap", -1)
    assert done.exit_code == 2
    assert not (tmp_path / "lora").exists()


def test_an_adapter_without_a_recipe_needs_data(tmp_path):
    tiny_moa().save_pretrained(tmp_path / "ours")
    done = export(tmp_path / "ours", "--output", tmp_path / "lora")
    assert done.exit_code == 2
    assert "--data" in done.output
