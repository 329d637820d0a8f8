"""What verbs print: paths and names stand there as they are, whatever markup or emoji they look like."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import moa.cli
from moa.cli import app
from moa.cli.tables import accuracy_table, progress_bar
from moa.cli.terminal import terminal

ODD = ["runs/:smile:/x", "[bold]x[/bold]", "a[/]b", ":warning:"]


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of them."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("folder", ["runs/:smile:", "[bold]", "a[/]b"])
def test_paths_are_printed_as_they_are(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    copied = CliRunner().invoke(app, ["recipes", "cp", "embedded-soft-moa", f"{folder}/x.yaml"])
    assert copied.output == f"copied to {folder}/x.yaml; run it with: moa train {folder}/x.yaml\n"
    shown = CliRunner().invoke(app, ["recipes", "validate", f"{folder}/x.yaml"])
    assert f"{folder}/x.yaml: valid (" in shown.output
    wrong = CliRunner().invoke(app, ["watch", f"{folder}/nowhere"])
    assert (wrong.exit_code, f"{folder}/nowhere" in wrong.output) == (2, True)


@pytest.mark.parametrize("name", ODD)
def test_names_in_tables_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]):
    data = SimpleNamespace(name=name, family=f"{name} family", chance=None)
    result = SimpleNamespace(interval=(0.0, 1.0), too_long=0, accuracy=0.5, items=[None])
    terminal().print(accuracy_table([(data, result)] * 2, {data.family: 0.5, "all": 0.5}))
    written = capsys.readouterr().out
    assert written.count(f" {name} ") == 5  # set and family in two rows, and their mean
    assert f"mean of {name} family" in written


@pytest.mark.parametrize("name", ODD)
def test_names_in_bars_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]):
    bar = progress_bar(terminal())
    bar.add_task(name, total=1)
    terminal().print(bar.get_renderable())
    assert name in capsys.readouterr().out


def test_no_verb_has_a_console_of_its_own():
    sources = {path: path.read_text() for path in Path(moa.cli.__file__).parent.rglob("*.py")}
    assert [path.name for path, text in sources.items() if "Console(" in text] == ["terminal.py"]
    assert not [path for path, text in sources.items() if "from_markup" in text or "[/]" in text]
