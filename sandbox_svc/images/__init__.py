"""Container images as states, and states as container images, without an engine."""
