"""Checks that all settings share."""

from __future__ import annotations

import math

import pytest

from moa.adapters.gating import GATINGS
from moa.choices import build, check_range


@pytest.mark.parametrize("value", [1, 8, 10**400])
def test_whole_numbers_pass(value):
    check_range("r", value, low=1, whole=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.5, "r=2.5 must be a whole number"),
        (2.0, "r=2.0 must be a whole number"),
        (True, "r=True must be a whole number"),
        ("8", "r='8' must be a whole number"),
        (0, r"r=0 is outside of \[1, inf\]"),
    ],
)
def test_anything_else_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=message):
        check_range("r", value, low=1, whole=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "gating=5 must be a mapping of its settings"),
        ({"kind": []}, r"gating: kind=\[\] is not one of"),
        ({"kind": "soft", 3: 1}, "gating 'soft' has no field 3"),
    ],
)
def test_what_describes_no_part_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build("gating", GATINGS, given)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_in_no_range(value):
    with pytest.raises(ValueError, match=r"rate=-?(inf|nan) (must be a finite number|is outside of)"):
        check_range("rate", value, low=-math.inf)
