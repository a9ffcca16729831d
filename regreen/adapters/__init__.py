"""Regreen under the interfaces of other agent frameworks.

- Importing this package imports none of them: each adapter needs the extra `adapters`.
"""
