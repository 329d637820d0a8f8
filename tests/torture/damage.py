"""Seeded ways to damage a file: bytes, JSON and YAML, headers of safetensors and GGUF, and what lies at its path.

Every function takes a `random.Random` and what is good, and gives something hostile; the same seed, the same damage.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DEEP = 20_000
HUGE = [2**31, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]

LEAVES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        2**31,
        2**63,
        2**70,
        10**400,
        -(10**400),
        "",
        " ",
        "0",
        "1e400",
        "nan",
        "x",
        "x" * 5000,
        "\x00",
        "a\x00b",
        "\ud800",
    ),
    *(
        "../../../../etc/passwd",
        "/etc/passwd",
        "~root",
        "..",
        ".",
        "/dev/zero",
        "C:\\con",
        "ключ/名前",
        "\u202e\u0000",
        "%s{}",
    ),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"b": {}}}, {"kind": "lora"}, {"kind": []}, ["lora", "lora"]),
    *(
        {"preset": []},
        [1, "a", None],
        {"kind": {}},
        [[1.0], [2.0, 3.0]],
        [True],
        "!!python/object:os.system",
        "tasks:",
        ":",
        "text:@",
    ),
]

TEXTS = [
    b"",
    b" ",
    b"\n",
    b"\x00",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"0",
    b"NaN",
    b"{",
    b"[",
    b'{"a":',
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf",
    b"\xef\xbb\xbf{}",
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b"- " * 2000,
    b"9" * 5000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": 1e999}',
    b'{"a": "\\ud800"}',
    b"\xed\xa0\x80",
    "{}".encode("utf-16"),
    "{}".encode("utf-32"),
    b"x" * 1_000_000,
]

BOMBS = [
    b"a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)),
    b"a: &a [*a]\n",
    b"a: &a {b: *a}\n",
    b"&a : *a\n",
    b"? [a, b]\n: 1\n",
    b"? {a: b}\n: 1\n",
    b"<<: 1\n",
    b"<<: {a: 1}\n",
    b"a: 2001-01-01\n",
    b"2001-01-01: 1\n",
    b"a: !!binary aGk=\n",
    b"a: !!set {b}\n",
    b"a: !!python/name:os.system\n",
    b"a: !!int x\n",
    b"a: !!float x\n",
    b"a: !!timestamp x\n",
    b"a: 1:2:3:4\n",
    b"a: 0x\n",
    b"a: 1\na: 2\n",
    b"--- a\n--- b\n",
    b"%YAML 9.9\n---\na: 1\n",
    b"a: *b\n",
    b"a\tb: c\n",
    b"1: 2\ntrue: 3\nnull: 4\n.nan: 5\n",
    b"a: " + b"{b: " * 500 + b"}" * 500,
    b"a: !!omap [b]\n",
    b"a: 99999999999-99-99\n",
    b"a: 2001-99-99\n",
    b"a: &a " + b"[" * 900 + b"]" * 900 + b"\nb: *a\n",
]


def of_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, flipped, doubled, overwritten, or something else altogether."""
    if not content or rng.random() < 0.1:
        return rng.choice(TEXTS)
    kind, place = rng.randrange(8), rng.randrange(len(content))
    end = min(len(content), place + rng.randrange(1, 64))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[place:]
    if kind == 2:
        return content[:place] + content[end:]
    if kind == 3:
        return content[:end] + content[place:]
    if kind == 4:
        return content[:place] + rng.randbytes(end - place) + content[end:]
    if kind == 5:
        return content[:place] + bytes(end - place) + content[end:]
    if kind == 6:
        return content + rng.choice([b"\x00", b"}", b"]", b"\n{", b"x" * 100, content])
    flipped = bytearray(content)
    for _ in range(rng.randrange(1, 6)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def of_tree(rng: random.Random, tree: Any) -> Any:
    """One to three values replaced, removed, renamed, added or wrapped, anywhere in nested dicts and lists."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randrange(1, 4)):
        nodes = [(tree, key) for key in _keys(tree)]
        for parent, key in nodes:
            nodes.extend((parent[key], inner) for inner in _keys(parent[key]))
        if not nodes:
            return rng.choice(LEAVES)
        parent, key = rng.choice(nodes)
        kind = rng.randrange(6)
        if kind <= 2:
            parent[key] = copy.deepcopy(rng.choice(LEAVES))
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            other = rng.choice([*map(str, filter(lambda leaf: not isinstance(leaf, dict | list), LEAVES)), f"{key}x"])
            parent[other if isinstance(parent, dict) else key] = parent[key]
        else:
            parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, {str(key): parent[key]}, [parent[key]] * 2])
    return tree


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def of_json(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.35:
        return of_bytes(rng, content)
    return json.dumps(of_tree(rng, json.loads(content)), ensure_ascii=rng.random() < 0.7).encode(
        "utf-8", "surrogatepass"
    )


def of_lines(rng: random.Random, content: bytes) -> bytes:
    """JSON lines: one line damaged, doubled, lost or moved."""
    lines = content.splitlines(keepends=True)
    place, kind = rng.randrange(len(lines)), rng.randrange(8)
    if kind == 0:
        return of_bytes(rng, content)
    if kind == 1:
        rng.shuffle(lines)
    elif kind == 2:
        lines.insert(place, lines[place])
    elif kind == 3:
        del lines[place]
    else:
        lines[place] = of_json(rng, lines[place].strip()) + b"\n"
    return b"".join(lines)


def of_yaml(rng: random.Random, content: bytes) -> bytes:
    if (kind := rng.random()) < 0.25:
        return of_bytes(rng, content)
    if kind < 0.4:
        return rng.choice([content, b""]) + rng.choice(BOMBS)
    tree = of_tree(rng, yaml.safe_load(content))
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, TypeError):  # JSON is YAML, too
        return json.dumps(tree).encode()


def of_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header's size, names, dtypes, shapes and places lie; numbers are not finite."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind, name = rng.randrange(9), rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    if kind == 0:
        return of_bytes(rng, content)
    if kind == 1:
        return struct.pack("<Q", rng.choice([*HUGE, size + 1, size - 1, 0, 1])) + content[8:]
    if kind == 2:
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "X", "", None, 3, "f32"])
    elif kind == 3:
        entry["shape"] = rng.choice(
            [[*HUGE[:2]], [], [0], [-1], [1, *entry["shape"]], entry["shape"][::-1], [2**40], None, "x", [0.5]]
        )
    elif kind == 4:
        entry["data_offsets"] = rng.choice(
            [[0, 2**40], [2**63, 2**64], [4, 0], [0, 0], [-1, 4], [0], None, ["a", "b"], [1, 5]]
        )
    elif kind == 5:
        header[rng.choice(["../../x", "\x00", "", "a" * 3000, "ключ.\u202e", name + ".weight"])] = header.pop(name)
    elif kind == 6:
        header = of_tree(rng, header)
    elif kind == 7:
        del header[name]
    else:
        start, end = entry["data_offsets"]
        lies = {"F32": struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 3e38]))}
        bad = lies.get(entry["dtype"], b"\xff\xff")
        body = body[:start] + (bad * (end - start))[: end - start] + body[end:]
    try:
        text = json.dumps(header).encode()
    except ValueError:
        text = b"{}"
    if rng.random() < 0.05:
        text = b'{"a":' * DEEP + b"1" + b"}" * DEEP
    return struct.pack("<Q", len(text)) + text + body


def of_gguf(rng: random.Random, content: bytes) -> bytes:
    """A number in the first bytes or a string's length, a count or an offset becomes one that lies."""
    if rng.random() < 0.4:
        return of_bytes(rng, content)
    head = min(len(content) - 8, 24 if rng.random() < 0.3 else 9000)
    place = rng.randrange(0, head)
    if rng.random() < 0.5:
        return content[:place] + struct.pack("<Q", rng.choice([*HUGE, 0, 1, 2])) + content[place + 8 :]
    return content[:place] + struct.pack("<I", rng.choice([2**31, 2**32 - 1, 0, 1, 8, 9, 99])) + content[place + 4 :]


def at_path(rng: random.Random, file: Path) -> str:
    """Something else in the file's place; gives its name."""

    def link(target: str) -> Callable[[], None]:
        return lambda: os.symlink(target, file)

    ways: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "folder": file.mkdir,
        "loop": link(file.name),
        "dangling": link("/nowhere/at/all"),
        "endless": link("/dev/zero"),
        "null": link("/dev/null"),
        "passwd": link("/etc/passwd"),
        "pipe": lambda: os.mkfifo(file),
        "sparse": lambda: _sparse(file),
    }
    way = rng.choice(list(ways))
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    ways[way]()
    return way


def _sparse(file: Path) -> None:
    """Says that it is large and takes no room on the disk."""
    with file.open("wb") as out:
        out.truncate(2**25)
