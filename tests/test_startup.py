"""Help pages and mistakes are answered without loading torch, which takes seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

from moa.cli import VERBS

# One process for many command lines: what one of them loads shows from there on.
CHILD = """
import json, sys
import moa_command
from typer.testing import CliRunner
from moa.cli import app
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "scipy"}
answers = []
for line in json.load(sys.stdin):
    result = CliRunner().invoke(app, line.split())
    answers.append((result.exit_code, result.output, sorted(HEAVY & sys.modules.keys())))
print(json.dumps(answers))
"""

LINES = [
    *("", *VERBS, "recipes ls", "recipes cp", "recipes validate"),
    *(f"spans {step}" for step in ("calibrate", "profile", "search", "validate", "run", "export")),
]

MISTAKES = {
    "nosuch": "No such command",
    "eval --bad 1": "No such option",
    "eval --dtype float8": "'float8' is not one of",
    "eval /nowhere": "there is no adapter '/nowhere'",
    "eval --spans /nowhere.json": "there is no span plan '/nowhere.json'",
    "generate /nowhere hello": "there is no adapter '/nowhere'",
    "inspect /nowhere": "there is no adapter '/nowhere'",
    "train nosuch": "there is no recipe 'nosuch'",
    "train embedded-soft-moa --learnin_rate 1": "did you mean 'learning_rate'",
    "train embedded-soft-moa --learning_rate 3": "learning_rate=3 is outside of its range",
    "recipes cp nosuch": "there is no recipe 'nosuch'",
    "spans search nosuch": "there is no span recipe 'nosuch'",
    "spans search smollm2-spans --densty 1": "did you mean 'density'",
    "bench nosuch.yaml": "there is no study 'nosuch.yaml'",
}


def answers(lines: list[str]) -> Iterator[tuple[str, int, str, list[str]]]:
    """Of every command line: exit code, what was said, and which heavy libraries are loaded by now."""
    result = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(lines), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line, (code, said, loaded) in zip(lines, json.loads(result.stdout), strict=True):
        yield line, code, " ".join(said.replace("│", " ").split()), loaded


def test_help_loads_nothing_heavy():
    for line, code, said, loaded in answers([f"{line} --help" for line in LINES]):
        assert code == 0, (line, said)
        assert "Usage:" in said
        assert loaded == [], line
        if line == " --help":
            listed = said.partition("Commands")[2]
            assert all(re.search(rf" {verb} [A-Z]", listed) for verb in VERBS), said


def test_a_verb_is_imported_when_it_is_asked_for():
    code = (
        "import sys, moa_command; from typer.testing import CliRunner; from moa.cli import app; "
        "CliRunner().invoke(app, ['import-reference', '--help']); "
        "print(*sorted(name for name in sys.modules if name.startswith('moa.cli.')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    shared = {"moa.cli.errors", "moa.cli.keys", "moa.cli.terminal"}
    assert set(result.stdout.split()) - shared == {"moa.cli.import_reference"}, result.stderr


def test_a_mistake_loads_nothing_heavy():
    for line, code, said, loaded in answers(list(MISTAKES)):
        assert code == 2, (line, said)
        assert MISTAKES[line] in said
        assert loaded == [], line


def test_python_m_moa_answers_without_loading_torch(tmp_path):
    """And whoever else is started by `python -m` and imports moa gets all of it."""
    line = [sys.executable, "-X", "importtime", "-m", "moa"]
    result = subprocess.run([*line, "recipes", "cp", "nosuch"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no recipe 'nosuch'" in result.stderr
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import moa; print(sorted(vars(moa))[0])")
    (tmp_path / "other" / "__main__.py").touch()
    result = subprocess.run([sys.executable, "-m", "other", "moa"], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "AdapterExpert", result.stderr


def test_the_package_is_whole_in_the_process_of_the_command():
    code = (
        "import sys, moa_command, moa; assert 'torch' not in sys.modules; "
        "print(moa.preset('soft-moa').peft_type.value, hasattr(moa, 'nothing'), hasattr(moa, '_nothing'))"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["MOA", "False", "False"], result.stderr
