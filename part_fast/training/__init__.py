"""Adversarial training: the loop, its step, the engine, the run folder."""
