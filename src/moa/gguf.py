"""Whether a GGUF file can be what it says: the readers of others take its counts and lengths for true.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by the type of a value
_STRING, _ARRAY = 8, 9
_DIMENSIONS, _LEVELS = 8, 4  # more than any model has
_WEIGHTS_PER_BYTE = 8


def check_gguf(path: Path) -> None:
    """Walk the header, with every length inside of the file. Takes time and memory by the file's size at most.

    Raises:
        ValueError: it is no GGUF file, is cut, or says what cannot be; names the file and the place in it.
    """
    with path.open("rb") as file:
        walk = _Walk(path, file)
        try:
            walk.header()
        except (_Wrong, struct.error) as error:
            raise ValueError(f"{path} is damaged, incomplete or no GGUF file: byte {file.tell():,}: {error}") from None


class _Wrong(Exception):
    """What is wrong at the place that the file is read at."""


class _Walk:
    def __init__(self, path: Path, file: BinaryIO):
        self.file, self.size, self.order = file, path.stat().st_size, "<"

    def header(self) -> None:
        if self.take(4) != b"GGUF":
            raise _Wrong("it does not begin with GGUF")
        version = self.number("I")
        if version & 0xFFFF == 0:  # written by a machine of the other byte order
            self.order = ">"
        tensors, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):
            self.skip(self.number("Q"))
            self.value(self.number("I"))
        for _ in range(tensors):
            self.skip(self.number("Q"))
            self.shape()
            self.skip(4)
            if (offset := self.number("Q")) > self.size:
                raise _Wrong(f"a tensor at {offset:,} of {self.size:,} bytes")

    def shape(self) -> None:
        if (dimensions := self.number("I")) > _DIMENSIONS:
            raise _Wrong(f"a tensor of {dimensions:,} dimensions")
        weights = math.prod(self.number("Q") for _ in range(dimensions))
        if weights > _WEIGHTS_PER_BYTE * self.size:
            raise _Wrong(f"a tensor of {weights:,} weights in a file of {self.size:,} bytes")

    def value(self, kind: int, level: int = 0) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and level < _LEVELS:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
            else:
                for _ in range(count):  # each takes bytes, so that a count that lies ends with the file
                    self.value(inner, level + 1)
        else:
            raise _Wrong(f"a value of the unknown type {kind}")

    def number(self, form: str) -> int:
        found = struct.unpack(self.order + form, self.take(struct.calcsize(self.order + form)))[0]
        assert isinstance(found, int)
        return found

    def take(self, count: int) -> bytes:
        self.check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self.check(count)
        self.file.seek(count, 1)

    def check(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise _Wrong(f"{count:,} bytes are to follow, but there are {self.size - self.file.tell():,}")
