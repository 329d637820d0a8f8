"""Which mixture ms-swift's `tuner_type: moa` trains."""

import moa
from moa.integrations.swift import register

register(moa.preset("soft-moa", r=16, alpha=16))
