"""Schema changes, in order; `dataset_svc.database.upgrade` applies them.

- A migration that has been released never changes; a test compares the result with `models.py`.
"""
