"""Experiments: the demo, the study, the poster's tables, and how their runs are compared."""
