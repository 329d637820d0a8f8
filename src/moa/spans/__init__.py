"""Mixture of Attention spans: every KV head keeps only as much context as it needs."""

from moa.spans.plan import SpanPlan
from moa.spans.rule import Rule, span
from moa.spans.runtime.application import AppliedSpans, apply_spans
from moa.spans.runtime.cache import cache_bytes

__all__ = ["AppliedSpans", "Rule", "SpanPlan", "apply_spans", "cache_bytes", "span"]
