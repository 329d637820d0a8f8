"""kill -9 at any moment, and the same command again: what comes out is what an unbroken run gives, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest
from amount import SHARE, amount
from commands import Command, check_whole, finish, run

pytestmark = pytest.mark.torture


@pytest.mark.parametrize("name", ["train", "bench", "profile", "search"])
def test_nothing_is_lost(name: str, commands: dict[str, Command], capsys: pytest.CaptureFixture[str]):
    command = commands[name]
    whole = command.unbroken
    rng, kills, number = random.Random(name), 0, amount(short=1, long=50)
    for turn in range(number):
        command.reset()
        for _ in range(1 + (rng.random() < 0.3)):  # who goes on may be killed, too
            moment = rng.random()
            fault = {"at": int(1 + moment * whole.events)} if turn % 2 else {"after": moment * whole.seconds}
            code, said = run(command, **fault)
            assert code in (0, -signal.SIGKILL), said[-3000:]
            killed = code != 0
            kills += killed
            check_whole(command.folder)
            if not killed:
                break
        if killed:
            finish(command)
        check_whole(command.folder)
        assert command.result(command.folder) == whole.result, turn
    with capsys.disabled():
        print(f"\nmoa {name}: killed {kills} times in {number} runs of {whole.seconds:.1f} s; every result is the same")


@pytest.mark.skipif(SHARE == 0, reason="the long form alone: every start imports everything")
def test_the_real_command(commands: dict[str, Command], capsys: pytest.CaptureFixture[str]):
    """As a user starts it, a process of its own from the first import on."""
    command, kills = commands["search"], 0
    command.reset()
    line = [sys.executable, "-m", "moa_command", *command.arguments]
    began = time.monotonic()
    subprocess.run(line, check=True, capture_output=True)
    seconds, wanted, rng = time.monotonic() - began, command.result(command.folder), random.Random(0)
    for _ in range(amount(short=1, long=5)):
        command.reset()
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds * (0.5 + 0.5 * rng.random()))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.wait()
        check_whole(command.folder)
        subprocess.run(line, check=True, capture_output=True)
        assert command.result(command.folder) == wanted
    with capsys.disabled():
        print(f"\nmoa as a process of its own: killed {kills} times; every result is the same")
