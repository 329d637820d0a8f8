"""What the official implementation wrote and computed, in our terms: its settings, its weights, its files."""

from moa.adapters.reference.settings import reference_config
from moa.adapters.reference.weights import load_reference

__all__ = ["load_reference", "reference_config"]
