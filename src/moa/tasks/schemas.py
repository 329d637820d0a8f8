"""Winograd-like schemas: a story of two people and a reason that fits only one of them.

Each entry is `(story, state, refers_to_first)`; read "`story` because he/she `state`".
"""

from __future__ import annotations

_PAIRS = (
    ("{a} could not lift {b}", "was too weak", "was too heavy"),
    ("{a} thanked {b}", "got a present", "gave a present"),
    ("{a} asked {b} for help", "was lost", "knew the way"),
    ("{a} won the race against {b}", "was fast", "was slow"),
    ("{a} lost the race against {b}", "was slow", "was fast"),
    ("{a} gave bread to {b}", "was kind", "was hungry"),
    ("{a} gave {b} a coat", "had two coats", "was cold"),
    ("{a} lent money to {b}", "was rich", "was poor"),
    ("{a} borrowed money from {b}", "was poor", "was rich"),
    ("{a} taught {b} to read", "was a teacher", "was a pupil"),
    ("{a} visited {b} in hospital", "was worried", "was ill"),
    ("{a} carried the bag for {b}", "was strong", "was tired"),
    ("{a} paid {b}", "bought a horse", "sold a horse"),
    ("{a} could not see over {b}", "was short", "was tall"),
    ("{a} hid from {b}", "was afraid", "was angry"),
    ("{a} woke {b}", "made a noise", "was asleep"),
    ("{a} said sorry to {b}", "broke a cup", "owned the cup"),
    ("{a} could not hear {b}", "was deaf", "spoke softly"),
    ("{a} obeyed {b}", "was a servant", "was the master"),
    ("{a} caught {b}", "ran after the thief", "stole a watch"),
)

SCHEMAS: tuple[tuple[str, str, bool], ...] = tuple(
    entry for story, first, second in _PAIRS for entry in ((story, first, True), (story, second, False))
)
