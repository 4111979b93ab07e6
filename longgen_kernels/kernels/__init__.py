"""Backends: each runs an `AttentionProblem` or says why it cannot."""
