"""MoA in the tools people already use: one module per tool, to be named in that tool's own configuration.

Nothing of a tool is imported before its module is. `log_router` is for every trainer that is transformers' `Trainer`.
"""

from moa.training.routing import log_router

__all__ = ["log_router"]
