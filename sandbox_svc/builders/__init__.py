"""Builders turn an `EnvironmentSpec` into the layers of a State."""
