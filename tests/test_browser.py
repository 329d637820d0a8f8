"""Every page in a real browser: silent, offline, legible, within its width, and usable from the keyboard."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from browser import PALE, USABLE, chromium, requests, screenshot, show
from test_inspection import inspected
from tiny import tiny_config, tiny_moa

import moa
from moa.cli.watch import server
from moa.report.inspection import write_report as inspection_page
from moa.report.spans import write_report as spans_page
from moa.report.watch import page_of
from moa.studies.report import write_report as study_page

STUDIES = Path(__file__).parent.parent / "benchmarks" / "results" / "studies"
PAGES = ("inspection", "pair", "spans", "study", "unfinished", "watch", "begun")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in PAGES}
    mixture = inspected(tiny_moa())
    inspection_page(found["inspection"], [mixture])
    inspection_page(found["pair"], [mixture, inspected(tiny_moa(tiny_config(gating=moa.Soft())))])
    plans = a_front()
    spans_page(found["spans"], plans[1], plans, 8192)
    results = json.loads((STUDIES / "smollm2.json").read_text(encoding="utf-8"))
    results |= {"claims": results["claims"][:2], "rows": results["rows"][:8]}
    study_page(results, found["study"])
    study_page(results | {"claims": [], "missing_cells": 3, "at_chance": ["a", "b"]}, found["unfinished"])
    found["watch"].write_text(page_of(a_run(folder / "run", 120), refresh=None))
    found["begun"].write_text(page_of(a_run(folder / "begun", 0)))
    return found


def a_front() -> list[moa.SpanPlan]:
    """Plans of a model with 30 layers and 3 KV heads, as a search and a validation leave them."""
    plans = [moa.SpanPlan.uniform(30, 3, density) for density in (0.25, 0.5, 0.75)]
    for place, plan in enumerate(plans):
        losses = {"2048": 1.0 + place, "8192": 3.0 - place}
        plan.searched = {"losses": losses, "kv_density": {"2048": 0.5}, "kind": "searched", "seed": 0}
    measured = {
        "dense_loss": 1.5,
        "loss": 1.25,
        "chosen": 1,
        "losses_of_all": [2, 1.25, 1.5],
        "length": 12288,
        "items": 2,
    }
    measured |= {"dense_accuracy": 1.0, "accuracy": 0.875, "accuracies_of_all": [0.625, 0.875, 1], "kv_density": 0.5}
    measured |= {"uniform_loss": 1.75, "uniform_accuracy": 0.5, "uniform_kv_density": 0.5}
    plans[1].searched["validation"] = measured
    return plans


def a_run(folder: Path, steps: int) -> Path:
    """What `moa train` leaves after so many steps."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("base: embedded\n")
    log = [
        {"step": n, "loss": 3 / (n + 1), "learning_rate": 1e-3 * n / 200, "router/gate": 0.4} for n in range(1, steps)
    ]
    (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    experts = ["q", "k", "v", "o", "down", "prompt", "parallel"]
    routers = [{"block": n, "site": None, "experts": experts, "gates": [0.1 * n for n in range(7)]} for n in range(30)]
    if steps:
        (folder / "progress.json").write_text(json.dumps({"step": steps, "steps": 200, "routers": routers}))
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_silent_offline_legible_and_usable(name: str, pages: dict[str, Path], driver: Any, tmp_path: Path):
    folder = Path(os.environ.get("MOA_SCREENSHOTS", tmp_path))
    for width in (400, 1600):
        for scheme in ("light", "dark"):
            show(driver, pages[name].as_uri(), width, scheme)
            open_folds(driver)
            assert driver.get_log("browser") == []
            assert [one for one in requests(driver) if not one.startswith(("file:", "data:"))] == []
            assert driver.execute_script(PALE) == []
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            if scheme == "light":
                check_keyboard(driver)
            paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, paper[4:-1].split(","))) > 384) == (scheme == "light")
            screenshot(driver, folder / f"{name}-{width}-{scheme}.png")
            assert (folder / f"{name}-{width}-{scheme}.png").stat().st_size > 5000


def open_folds(driver: Any) -> None:
    driver.execute_script("document.querySelectorAll('details').forEach(fold => fold.open = true)")


def check_keyboard(driver: Any) -> None:
    """Tab reaches everything that can be used, in the page's order, and shows where it is."""
    from selenium.webdriver.common.keys import Keys

    usable = driver.execute_script(USABLE)
    if not usable:
        return
    driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(4 * len(usable) + 10):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        active = driver.switch_to.active_element
        if active.tag_name == "body" or active in reached:
            break
        outline = driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active)
        assert outline not in ("", "none"), active.get_attribute("outerHTML")[:200]
        reached.append(active)
    missed = [one.get_attribute("outerHTML")[:200] for one in usable if one not in reached]
    assert missed == []
    assert [one for one in reached if one in usable] == usable


def test_a_run_is_shown_as_it_goes_on(driver: Any, tmp_path: Path):
    run = a_run(tmp_path / "run", 10)
    with server(run, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{serving.server_address[1]}/"
            show(driver, address, 800, "light")
            assert "Step 10 of 200 (5%)" in driver.page_source
            assert driver.execute_script("return document.querySelectorAll('table tbody tr').length") == 30
            progress = json.loads((run / "progress.json").read_text()) | {"step": 20}
            (run / "progress.json").write_text(json.dumps(progress))
            wait_for(driver, "Step 20 of 200 (10%)")
            assert {one for one in requests(driver) if not one.endswith("favicon.ico")} == {address}
        finally:
            serving.shutdown()
            thread.join()


def wait_for(driver: Any, text: str) -> None:
    """Until the page, which asks for itself again, says it."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda found: text in found.page_source)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("<p style='color: #999; background: #fff'>pale</p>", "pale"),
        ("<img src='https://example.invalid/a.png' alt=''>", "network"),
        ("<script>console.error('loud')</script>", "loud"),
        ("<div style='width: 500px'>wide</div>", "wide"),
        ("<a href='#' tabindex='-1'>hidden</a>", "keyboard"),
    ],
)
def test_the_checks_can_fail(body: str, what: str, driver: Any, tmp_path: Path):
    (tmp_path / "bad.html").write_text(f"<!doctype html><title>bad</title><body>{body}")
    show(driver, (tmp_path / "bad.html").as_uri(), 400, "light")
    assert bool(driver.execute_script(PALE)) == (what == "pale")
    assert any(one.startswith("https") for one in requests(driver)) == (what == "network")
    assert bool(driver.get_log("browser")) == (what in ("network", "loud"))
    assert (driver.execute_script("return document.documentElement.scrollWidth") > 400) == (what == "wide")
    if what == "keyboard":
        with pytest.raises(AssertionError):
            check_keyboard(driver)
