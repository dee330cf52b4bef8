"""Benchmarks, each a command of `part-fast bench`: ops, training steps, attack steps, maps, and how a step scales."""
