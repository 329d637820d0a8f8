"""What a trained mixture does with its experts: gates, dead experts, tokens of answers, similarity of experts.

Everything is watched from outside, by hooks that come off again, and comes back as plain dataclasses.
"""

from moa.inspection.inspect import inspect_adapter
from moa.inspection.results import Inspection

__all__ = ["Inspection", "inspect_adapter"]
