"""Ways a run ends early that are nobody's bug: each says what happened, what is kept, and what to do."""

from __future__ import annotations


class TrainingStopped(RuntimeError):
    """Training ended before its last step; the message is for the user.

    Attributes:
        exit_code: of the command line.
    """

    exit_code = 1


class Diverged(TrainingStopped):
    """The loss or a trained weight is no longer a finite number."""


class DiskFull(TrainingStopped):
    """There was no room for a checkpoint or for the adapter."""


class Interrupted(TrainingStopped):
    """Ctrl-C: the step was finished and saved."""

    exit_code = 130
