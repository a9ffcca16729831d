"""Evaluation: run subjects on tasks, compare them with intervals, write the report.

- Every figure is computed from rows of the dataset service, so that it can be computed again.
- Statistics treat the task, not the sample, as the unit that repeats.
"""
