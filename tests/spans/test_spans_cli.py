"""`moa spans` from the model to an answer under the plan, on a tiny random model; resuming and mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moa.cli import app
from moa.cli.spans.recipe import PlanFolder, SpanRecipe
from moa.recipes import names
from moa.spans import SpanPlan, apply_spans
from moa.spans.evidence.influence import Influence

RECIPE = """
data: {source: "tasks:lines"}
lengths: [96, 192]
extend: [320]
validate_length: 256
items: 2
validate_items: 2
max_new_tokens: 4
signal: 0.0
dtype: float32
step: 32
slopes: 5
intervals: 2
sink: 16
block: 16
"""


def moa(*arguments: object, code: int = 0, text: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spans") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def done(recipe: Path, tiny_base: Path) -> tuple[Path, dict[str, str]]:
    """The output folder after all steps, and what each said."""
    folder = recipe.parent / "run"
    said = {}
    for verb in ("calibrate", "profile", "search", "validate"):
        said[verb] = moa("spans", verb, recipe, "--base", tiny_base, "--output", folder)
    return folder, said


def test_every_step_says_what_it_did_and_what_comes_next(done):
    folder, said = done
    for verb, following in zip(said, ("profile", "search", "validate", "run"), strict=True):
        assert f"next: moa spans {following}" in said[verb]
        assert f"--output {folder}" in said[verb]
    assert "2 of 96 tokens, 2 of 192 tokens" in said["calibrate"]
    assert "192 all 0 of 2" in said["calibrate"]
    assert "length 192: 2 items, response loss" in said["profile"]


def test_plan_carries_its_evidence(done, tiny_base):
    folder, _ = done
    plan = SpanPlan.load(folder)
    assert plan.model == str(tiny_base)
    assert (plan.sink, plan.block) == (16, 16)
    for length in (96, 192, 320):
        assert 0.4 <= plan.kv_density(length) <= 0.5 + 1e-9
    assert {"losses", "kv_density", "kind", "validation", "versions", "limits", "seed", "data"} <= plan.searched.keys()
    assert plan.searched["data"]["192"]["source"] == "tasks:lines"
    kinds = [SpanPlan.load(file).searched["kind"] for file in sorted((folder / "density-0.5").glob("plan-*.json"))]
    assert kinds[-2:] == ["two classes", "uniform"]
    assert set(kinds[:-2]) == {"searched"}
    assert plan.searched["validation"]["kinds"] == kinds
    assert plan.searched["validation"]["length"] == 256
    assert (folder / "density-0.5" / "report.html").read_text().startswith("<!doctype html>")
    for step in (folder, folder / "influence", folder / "density-0.5"):
        assert SpanRecipe.load(str(step / "recipe.yaml")).lengths == [96, 192]
    other = LlamaForCausalLM(AutoConfig.from_pretrained(tiny_base))
    other.config._name_or_path = "another"
    with pytest.raises(ValueError, match="searched for the model"):
        apply_spans(other, plan)


def test_run_answers_under_the_plan_and_counts_bytes(done, recipe, tiny_base):
    folder, _ = done
    said = moa(
        "spans", "run", recipe, "--base", tiny_base, "--output", folder, "--template", "none", text="abcdefgh" * 30
    )
    # 2 layers x 2 KV heads x keys and values x 8 numbers of 4 bytes, for every token
    held = int(said.split("tokens: ")[1].split(" bytes")[0].replace(",", ""))
    tokens = int(said.split("after ")[1].split(" tokens")[0])
    assert f"{tokens * 2 * 2 * 2 * 8 * 4:,} dense" in said
    assert 0.4 < held / (tokens * 256) < 0.6


def test_finished_steps_are_not_done_again(done, recipe, tiny_base):
    folder, _ = done
    files = [*folder.glob("*.jsonl"), *folder.glob("influence/*")]
    before = [file.read_bytes() for file in files]
    for verb in ("calibrate", "profile", "search", "validate"):
        moa("spans", verb, recipe, "--base", tiny_base, "--output", folder)
    assert [file.read_bytes() for file in files] == before


def test_other_settings_need_overwrite(done, recipe, tiny_base, tmp_path):
    folder, _ = done
    given = ("--base", tiny_base, "--output", folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert "floor was 0.9, now 0.8" in moa("spans", "search", recipe, *given, "--floor", 0.8, code=2)
    assert "items was 2, now 3" in moa("spans", "calibrate", recipe, *given, "--items", 3, code=2)
    assert "name the file itself" in moa(
        "spans", "run", recipe, *given, "--prompt", "a", "--spans", folder.parent, code=2
    )
    assert "need their far context" in moa("spans", "calibrate", recipe, *given, "--signal", 1.0, code=2)
    assert "is the influence of" in moa("spans", "search", recipe, "--base", "embedded", *given[2:], code=2)
    nothing = ("--lengths", "[64]", "--overwrite")  # even so: what is not there cannot take its place
    for verb in ("profile", "search"):
        moa("spans", verb, recipe, *given, *nothing, code=2)
    moa("spans", "search", recipe, *given, "--density", 0.01, "--overwrite", code=2)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_refused_overwrite_leaves_the_old_files(done, recipe, tiny_base):
    folder, _ = done
    given = ("--base", tiny_base, "--output", folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    impossible = ("--floor", 1.0, "--rules_per_layer", 1, "--slopes", 2, "--step", 64, "--overwrite")
    assert "no plan was found" in moa("spans", "search", recipe, *given, *impossible, code=2)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_several_workers_measure_the_same(done, recipe, tiny_base, tmp_path, monkeypatch):
    folder, _ = done
    shutil.copy(folder / "calibration.jsonl", tmp_path)
    given = ("spans", "profile", recipe, "--base", tiny_base, "--output", tmp_path, "--lengths", "[192]")
    monkeypatch.setattr("moa.studies.divided.TOGETHER", 1)
    assert "['local', 'ray']" in moa(*given, "--engine", "dask", code=2)
    assert "length 192: 2 items" in moa(*given, "--workers", 2)
    ours, theirs = (Influence.load(at / "influence" / "length-192.safetensors") for at in (tmp_path, folder))
    assert (ours.items, ours.about) == (2, theirs.about)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)  # of as many threads as a worker has, to the bit
    torch.testing.assert_close(ours.signed, theirs.signed, atol=1e-6, rtol=1e-4)
    assert not (tmp_path / "items").exists()


def test_one_profile_serves_many_densities(done, recipe, tiny_base, tmp_path):
    folder, _ = done
    given = ("--base", tiny_base, "--output", tmp_path, "--evidence", folder)
    both = ("--density", 0.4, 0.6)
    said = moa("spans", "search", recipe, *given, *both)
    assert str(tmp_path / "density-0.4") in said
    validated = moa("spans", "validate", recipe, *given, *both)
    assert f"--evidence {folder} --density 0.4 --prompt ..." in validated
    plans = {share: SpanPlan.load(tmp_path / f"density-{share}") for share in (0.4, 0.6)}
    for share, plan in plans.items():
        assert plan.searched["limits"]["density"] == share
        assert plan.kv_density(192) <= share + 1e-9
    with pytest.raises(FileNotFoundError, match="several densities"):
        SpanPlan.load(tmp_path)
    assert "name one with --density" in moa("spans", "run", recipe, *given, *both, "--prompt", "a", code=2)
    assert "KV cache after" in moa("spans", "run", recipe, *given, "--density", 0.4, "--prompt", "a" * 200)
    moa("spans", "search", recipe, *given, *both, "--floor", 0.5, "--overwrite")
    assert SpanPlan.load(tmp_path / "density-0.4" / "plan-00.json").searched["limits"]["floor"] == 0.5
    assert not list(tmp_path.glob("density-*/span_plan.json"))  # it was chosen from plans that are no more


def test_mistakes_are_explained(recipe, tiny_base, tmp_path):
    given = ("--base", tiny_base, "--output", tmp_path / "out")
    assert "did you mean 'density'?" in moa("spans", "search", recipe, *given, "--densty", 0.6, code=2)
    assert "moa spans calibrate" in moa("spans", "profile", recipe, *given, code=2)
    assert "moa spans profile" in moa("spans", "search", recipe, *given, code=2)
    assert "moa spans search" in moa("spans", "validate", recipe, *given, code=2)
    assert "moa spans validate" in moa("spans", "run", recipe, *given, "--prompt", "a", code=2)
    assert "must be longer than the profiled 192" in moa("spans", "search", recipe, "--validate_length", 96, code=2)
    assert "not a multiple of block=16" in moa("spans", "search", recipe, "--lengths", "[100]", code=2)
    assert "there is no span recipe 'nothing'" in moa("spans", "search", "nothing", code=2)


def test_help_names_every_key():
    said = moa("spans", "search", "--help")
    for key in ("--density", "--rules_per_layer", "--data.source", "embedded-spans"):
        assert key in said


@pytest.mark.parametrize("name", names("span recipe"))
def test_shipped_recipes_are_valid_and_say_what_they_do(name, tmp_path):
    loaded = SpanRecipe.load(name, {"output": str(tmp_path)})
    loaded.save(tmp_path)
    again = SpanRecipe(**yaml.safe_load((tmp_path / "recipe.yaml").read_text()))
    assert again == loaded


def test_plans_stay_in_their_order_beyond_a_hundred(tmp_path):
    folder = PlanFolder(tmp_path)
    for place in (100, 9, 10, 11, 101):
        folder.plan(place).touch()
    assert folder.front() == [folder.plan(place) for place in (9, 10, 11, 100, 101)]


def test_half_a_profile_is_not_searched(recipe, done, tiny_base, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "run")
    settings = SpanRecipe.load(str(recipe), {"base": str(tiny_base), "output": str(folder)})
    file = settings.influence_file(96)
    half = Influence.load(file)
    half.items = 1
    half.save(file)
    said = moa("spans", "search", recipe, "--base", tiny_base, "--output", folder, code=2)
    assert "holds 1 of the 2 items of 96 tokens" in said
    assert "`moa spans profile` was stopped" in said


def test_fewer_items_than_asked_for_are_told(recipe, done, tiny_base, tmp_path):
    folder = shutil.copytree(done[0], tmp_path / "run")
    said = moa("spans", "validate", recipe, "--base", tiny_base, "--output", folder, "--validate_items", 3)
    assert "has 2 of 3 items of 256 tokens" in said


def test_what_does_not_fit_into_the_context_is_refused(recipe, done, tiny_base):
    folder, _ = done
    said = moa("spans", "run", recipe, "--base", tiny_base, "--output", folder, "--prompt", "far " * 600, code=2)
    assert "tokens, but the model's context is 512" in said
    other = ["--lengths", "1024", "--extend", "[]", "--validate_length", "1100", "--output", folder.with_name("long")]
    said = moa("spans", "calibrate", recipe, "--base", tiny_base, *other, code=2)
    assert "length 1024 is more than the 512 tokens of the model's context" in said
