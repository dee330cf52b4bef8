"""Experiments: the demo, the study, the published tables, and how their runs are compared."""
