"""Benchmarks of ops and training steps."""
