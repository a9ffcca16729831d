"""Regreen: train, evaluate and serve agents that turn broken builds green again, and prove it."""

__version__ = "0.1.0"
