"""Budgets: how far each pixel may move."""
