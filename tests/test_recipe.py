"""Recipes: the shipped ones, flags over files, and the parameter counts of the official implementation."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from moa import MoAConfig
from moa.adapters.presets import adapter_config
from moa.recipes import find, names
from moa.settings import save
from moa.training.recipe import FILE_NAME, Recipe
from moa.training.validate import validate

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"

# Millions of parameters on Llama-3.1-8B, counted on the official code (its recorded settings).
OFFICIAL = {
    "paper-soft-moa": 24.52,
    "paper-sparse-moa": 22.29,
    "instance-moa": 24.52,
    "lora": 23.07,
    "prompt": 1.31,
    "parallel-adapter": 4.33,
    "unipelt": 17.57,
    "hydralora": 45.09,
    "molora": 100.14,
    "topk-molora": 100.14,
    "adamole": 101.12,
}


@pytest.mark.parametrize(("preset", "millions"), OFFICIAL.items())
def test_parameter_counts_equal_the_official_ones(preset, millions):
    assert round(validate(Recipe(base=LLAMA, adapter={"preset": preset})).adapter / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-3.1-8b-soft-moa-math", 24.52),
        ("llama-3.1-8b-soft-moa-commonsense", 18.09),
        ("llama-3.1-8b-sparse-moa-math", 22.29),
        ("llama-3.1-8b-sparse-moa-commonsense", 16.78),
        ("qwen3-8b-soft-moa-math", 24.34),
        ("qwen3-14b-soft-moa-math", 34.29),
    ],
)
def test_shipped_recipes_have_the_papers_size(name, millions):
    count = validate(Recipe.load(name))
    assert round(count.adapter / 1e6, 2) == millions
    assert count.by_kind["router"] < count.adapter


def test_soft_moa_by_kind():
    count = validate(Recipe.load("llama-3.1-8b-soft-moa-math"))
    assert count.by_kind == {"lora": 11_534_336, "prompt": 1_311_744, "parallel": 4_325_888, "router": 7_348_320}
    assert count.total == 8_030_261_248 + count.adapter


def test_every_shipped_recipe_loads_and_explains_itself():
    assert {"embedded-soft-moa", "embedded-sparse-moa"} <= set(names())
    for name in names():
        recipe = Recipe.load(name)
        assert recipe.output == name
        assert find(name).read_text().startswith("# ")


def test_flags_override_the_file():
    flags = {"learning_rate": "1e-4", "adapter.r": "16", "data.train": "[a.jsonl, b.jsonl]", "dtype": "bfloat16"}
    recipe = Recipe.load("embedded-soft-moa", flags | {"adapter.router.hidden_per_expert": "0", "max_steps": "7"})
    assert recipe.learning_rate == 1e-4
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert (recipe.dtype, recipe.max_steps) == ("bfloat16", 7)
    config = adapter_config(recipe.adapter)
    assert config.experts[0].r == 16
    assert config.router.hidden_per_expert == 0


def test_a_change_to_gating_keeps_its_other_fields():
    section = {"preset": "sparse-moa", "gating": {"gamma_max": 0.2}}
    default = adapter_config({"preset": "sparse-moa"}).gating
    assert adapter_config(section).gating == dataclasses.replace(default, gamma_max=0.2)
    assert adapter_config({"preset": "sparse-moa", "gating": {"kind": "soft"}}).gating.kind == "soft"


def test_adapter_may_be_a_name_or_a_whole_configuration():
    assert Recipe.load("embedded-soft-moa", {"adapter": "lora"}).adapter == {"preset": "lora"}
    whole = MoAConfig().to_dict()
    assert adapter_config(Recipe(adapter=whole).adapter).to_dict() == whole


def test_a_saved_recipe_is_the_same_recipe(tmp_path):
    recipe = Recipe.load("embedded-sparse-moa", {"seed": "3", "warmup_steps": "5", "data.limit": "10"})
    save(recipe, tmp_path / FILE_NAME)
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_exponents_without_a_point_are_numbers(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 1e-4\nadapter: {preset: lora, alpha: 2e1}\n")
    recipe = Recipe.load(file)
    assert recipe.learning_rate == 1e-4
    assert adapter_config(recipe.adapter).experts[0].alpha == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate: 1", "no key 'learnin_rate' .did you mean 'learning_rate'"),
        ("data: {trian: x}", "data has no key 'trian' .did you mean 'train'"),
        ("data: x", "data must be a mapping of keys to values, not 'x'"),
        ("adapter: {preset: soft-moa, rr: 4}", "has no setting 'rr'"),
        ("adapter: {preset: soft_moa}", "did you mean 'soft-moa'"),
        ("adapter: {expert: []}", "adapter has no field 'expert' .did you mean 'experts'"),
        ("adapter: {preset: soft-moa, router: {hiden_per_expert: 1}}", "did you mean 'hidden_per_expert'"),
        ("adapter: {preset: soft-moa, r: 0}", "r=0 is outside of"),
        ("adapter: {preset: soft-moa, targets: [q, w]}", "targets?='w' is not one of"),
        ("learning_rate: 2", r"learning_rate=2 is outside of its range: at most 1"),
        ("learning_rate: fast", "learning_rate='fast' must be a number"),
        ("batch_size: 0", "batch_size=0 is outside of its range: at least 1"),
        ("batch_size: 2.5", "batch_size=2.5 must be a whole number"),
        ("batch_size: true", "batch_size=True must be a whole number"),
        ("four_bit: 1", "four_bit=1 must be true or false"),
        ("schedule: cosin", "did you mean 'cosine'"),
        ("data: {template: alpacca}", "did you mean 'alpaca'"),
        ("data: {train: []}", "names no source"),
        ("- 1", "the file must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_recipe_names_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(file)
    assert "mine.yaml" in str(caught.value)


def test_a_missing_recipe_offers_a_near_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'embedded-soft-moa'"):
        Recipe.load("embeded-soft-moa")


def test_recipes_are_plain_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("seed: !!python/object/apply:os.getpid []")
    with pytest.raises(ValueError, match="not YAML"):
        Recipe.load(file)
    assert all(isinstance(yaml.safe_load(find(name).read_text()), dict) for name in names())
