"""Benchmarks: how collectives and training steps are timed, and what becomes of the times."""
