"""`moa watch`: the page of a run, from what `moa train` leaves in its folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from moa.cli import app
from moa.cli.watch import server
from moa.report.watch import POINTS, curve, page_of


def moa(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_rows: Path) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    given = (
        "--data.train",
        tiny_rows,
        "--data.max_length",
        512,
        "--max_steps",
        3,
        "--log_steps",
        1,
        "--dtype",
        "float32",
    )
    moa("train", "embedded-soft-moa", "--base", tiny_base, "--output", folder, *given)
    return folder


def test_training_says_where_it_stands_and_what_every_router_does(run):
    progress = json.loads((run / "progress.json").read_text())
    assert (progress["step"], progress["steps"]) == (3, 3)
    assert [(router["block"], router["site"]) for router in progress["routers"]] == [(0, None), (1, None)]
    logged = json.loads((run / "training_log.jsonl").read_text().splitlines()[2])
    gates = [router["gates"] for router in progress["routers"]]
    assert progress["routers"][0]["experts"][-1] == "parallel"
    assert sum(map(sum, gates)) / sum(map(len, gates)) == pytest.approx(logged["router/gate"], abs=1e-3)


def test_the_page_shows_it(run, tmp_path):
    assert "page:" in moa("watch", run, "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "Finished after step 3 of 3." in text
    gate = json.loads((run / "progress.json").read_text())["routers"][1]["gates"][0]
    assert f">{gate:.2f}</td>" in text
    assert text.count("<polyline") == 2
    assert 'http-equiv="refresh"' not in text


def test_a_run_that_has_just_begun_and_one_that_is_half_written(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    assert "Nothing is logged yet." in page_of(tmp_path)
    assert 'http-equiv="refresh" content="5"' in page_of(tmp_path)
    whole = (run / "training_log.jsonl").read_text()
    (tmp_path / "training_log.jsonl").write_text(whole[: len(whole) // 2])
    (tmp_path / "progress.json").write_text((run / "progress.json").read_text().replace('"steps": 3', '"steps": 9'))
    assert re.search(r"Step 3 of 9 \(33%\); last heard of \d+ s ago", page_of(tmp_path))


def test_a_folder_without_a_run(tmp_path):
    assert "holds no run of `moa train`" in moa("watch", tmp_path, code=2)


def test_long_logs_are_thinned_by_means():
    entries = [{"step": step, "loss": float(step % 2)} for step in range(1, 4 * POINTS + 1)]
    drawn = curve(entries, "loss", "Loss", "")
    assert len(drawn["line"].split()) == POINTS
    assert (drawn["low"], drawn["high"], drawn["last"]) == ("0.5", "0.5", 4 * POINTS)


def test_a_run_that_is_gone_for_a_moment_ends_no_page(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    with server(copied, 0) as serving:
        address = f"http://localhost:{serving.server_address[1]}/"
        Thread(target=serving.serve_forever, daemon=True).start()
        with urlopen(address) as answer:
            assert "Refresh" not in answer.headers
        (copied / "recipe.yaml").unlink()
        with pytest.raises(HTTPError, match="503") as gone:
            urlopen(address)
        assert gone.value.headers["Refresh"] == "5"
        assert b"holds no run" in gone.value.read()
        with pytest.raises(OSError, match=f"--port={serving.server_address[1]} cannot be had"):
            server(copied, serving.server_address[1])
        serving.shutdown()
