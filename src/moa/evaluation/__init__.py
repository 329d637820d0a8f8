"""Measuring what a model answers: fixed extraction rules, greedy accuracy, loss on answers."""
