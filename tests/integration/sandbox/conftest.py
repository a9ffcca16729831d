"""Fixtures of the sandbox service's tests."""

from tests.integration.sandbox.overlay import service

__all__ = ["service"]
