"""No room on the disk, folders that cannot be written to, and two runs in one folder."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from amount import SHARE, amount
from commands import Command, check_whole, files_in, finish, in_blocks, run
from typer.testing import CliRunner

from moa.cli import app
from moa.files import alone

pytestmark = pytest.mark.torture
LONG = pytest.mark.skipif(SHARE == 0, reason="the long form alone: a study takes longest")
NAMES = ["train", pytest.param("bench", marks=LONG), "profile", "search"]


def told(code: int, said: str) -> None:
    """The command ended with words for the user, or with success."""
    assert code in (0, 1, 2), said[-2000:]
    assert "looks like a bug" not in said, said[-3000:]
    assert code == 0 or any(words in said for words in ("no space left", "No space left", "too large")), said[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_files_that_cannot_grow(name: str, commands: dict[str, Command], capsys: pytest.CaptureFixture[str]):
    """A limit of the process, as of a quota: every user can set one."""
    command, full, rng = commands[name], 0, random.Random(name)
    whole = command.unbroken
    for _ in range(turns := amount(short=1, long=15)):
        command.reset()
        code, said = run(command, largest=int(1.5 * whole.largest * rng.random()))
        told(code, said)
        full += code != 0
        check_whole(command.folder)
        finish(command)
        assert command.result(command.folder) == whole.result
    with capsys.disabled():
        print(f"\nmoa {name}: {full} of {turns} limits were too small, and every run went on without one")


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "moa-torture", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def before(command: Command) -> int:
    """Bytes that the command starts from."""
    return in_blocks(files_in(command.before)) if command.before else 0


@contextmanager
def prepared_disk(command: Command) -> Iterator[int]:
    """A disk with what the command starts from, in its folder; yields the bytes that are in use."""
    with disk(command.folder, before(command) + 65536):
        if command.before:
            shutil.copytree(command.before, command.folder, dirs_exist_ok=True)
        yield shutil.disk_usage(command.folder).used  # in whole pages


def grown(folder: Path, size: int | str) -> None:
    """The disk has another size from here on."""
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0 or SHARE == 0, reason="mounts: long form")
@pytest.mark.parametrize("name", NAMES)
def test_a_small_disk(name: str, commands: dict[str, Command], capsys: pytest.CaptureFixture[str]):
    """Of up to half as much again as an unbroken run was seen to hold; then there is room, and the command goes on."""
    command, full, rng = commands[name], 0, random.Random(name)
    whole = command.unbroken
    shutil.rmtree(command.folder, ignore_errors=True)
    most = whole.bytes - before(command)
    for _ in range(turns := amount(short=1, long=25)):
        with prepared_disk(command) as used:
            grown(command.folder, used + 4096 + int(1.5 * most * rng.random()))
            code, said = run(command)
            told(code, said)
            full += code != 0
            check_whole(command.folder)
            grown(command.folder, "1g")
            finish(command)
            assert command.result(command.folder) == whole.result
    with capsys.disabled():
        print(f"\nmoa {name}: {full} of {turns} disks were too small, and every run went on when there was room")


@pytest.mark.parametrize("name", NAMES)
def test_the_second_run_in_a_folder_is_refused(name: str, commands: dict[str, Command]):
    command = commands[name]
    command.reset()
    inner = {"search": "density-0.4"}.get(name, "")
    with alone(command.folder / inner):
        before = sorted(str(file) for file in command.folder.rglob("*"))
        code, said = run(command)
        assert (code, "another process is at work" in said) == (2, True), said[-2000:]
        assert sorted(str(file) for file in command.folder.rglob("*")) == before
    finish(command)
    assert not list(command.folder.rglob(".lock"))


def test_folders_that_cannot_be_written(commands: dict[str, Command], tmp_path: Path):
    """A file in the way and /proc are refused to root, too."""
    (tmp_path / "file").touch()
    for command in commands.values():
        for place in (tmp_path / "file" / "below", Path("/proc/nowhere")):
            line = [*command.arguments[: command.arguments.index("--output")], "--output", str(place)]
            result = CliRunner().invoke(app, line)
            assert result.exit_code == 2, (line, result.output)
