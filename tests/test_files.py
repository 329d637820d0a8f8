"""Files are read whole or refused by name, written whole or not at all, and folders belong to one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa.files import LOCK, alone, read_json, read_lines, read_text, whole, write_text
from moa.spans.journal import Journal


def test_marks_of_windows_are_no_part_of_a_text(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_text(tmp_path / "a.json") == '{"a": 1}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", r"a\.json: not UTF-8 text"),
        (b"[" * 50_000, r"a\.json: not JSON \(nested too deeply\)"),
        (b"9" * 5000, r"a\.json: not JSON \(Exceeds the limit"),
        (b"{", r"a\.json: not JSON"),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_only_ordinary_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "endless", "."):
        with pytest.raises(ValueError, match="is a folder or a device, not a plan"):
            read_text(tmp_path / name, "plan")
    with pytest.raises(FileNotFoundError, match="there is no plan"):
        read_text(tmp_path / "loop", "plan")


def test_a_line_that_was_cut_inside_of_a_letter_is_left_out(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": "ü"}\n\n{"a": "ü'.encode()[:-1])
    assert list(read_lines(file, torn=True)) == [(f"{file}, line 1", {"a": "ü"})]
    with pytest.raises(ValueError, match="line 3: not JSON"):
        list(read_lines(file))


def test_a_journal_holds_any_text_that_json_can_spell(tmp_path: Path):
    journal = Journal(tmp_path / "a.jsonl", {"source": "\ud800"})
    journal.append({"text": "\udfff"})
    assert Journal(tmp_path / "a.jsonl", {"source": "\ud800"}).entries == [{"text": "\udfff"}]


def test_a_draft_that_fails_leaves_all_as_it_was(tmp_path: Path):
    def half(path: Path) -> None:
        with whole(path) as draft:
            draft.write_text("half")
            raise OSError("no room")

    write_text(tmp_path / "deep" / "kept", "before")
    with pytest.raises(OSError, match="no room"):
        half(tmp_path / "deep" / "kept")
    assert [(file.name, file.read_text()) for file in (tmp_path / "deep").iterdir()] == [("kept", "before")]


def test_a_folder_belongs_to_one_process(tmp_path: Path):
    code = "import sys, pathlib, moa_command; from moa.files import alone; alone(pathlib.Path(sys.argv[1])).__enter__()"
    other = [sys.executable, "-c", code, str(tmp_path / "new")]
    with alone(tmp_path / "new"):
        result = subprocess.run(other, capture_output=True, text=True)
        assert "another process is at work in" in result.stderr
    assert not (tmp_path / "new" / LOCK).exists()
    assert subprocess.run(other, capture_output=True).returncode == 0  # it ended without giving the lock back
    with alone(tmp_path / "new"):
        pass
