"""Tasks in the formats of other systems: read, kept as they are, written again.

- A task that cannot run here is kept with what it waits for; none is dropped silently.
- Nothing that is read counts as verified: the gate alone admits.
"""
