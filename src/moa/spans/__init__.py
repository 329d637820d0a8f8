"""Mixture of Attention spans: every KV head keeps only as much context as it needs."""

from moa.spans.application import AppliedSpans, apply_spans
from moa.spans.cache import cache_bytes
from moa.spans.plan import SpanPlan
from moa.spans.rule import Rule, span

__all__ = ["AppliedSpans", "Rule", "SpanPlan", "apply_spans", "cache_bytes", "span"]
