"""Rendezvous hashing: which workers a key prefers, in order, agreed upon without talking.

- The order depends on the key and the names alone: two fronts rank alike, and so does a restarted
  one.
- A worker that comes or goes moves only the keys that it wins or won (about 1/n of them).
"""

import hashlib
from collections.abc import Iterable, Sequence


def ranked(key: str, names: Iterable[str]) -> Sequence[str]:
    """`names` in the order in which `key` prefers them."""
    return sorted(names, key=lambda name: (_weight(key, name), name), reverse=True)


def _weight(key: str, name: str) -> bytes:
    return hashlib.sha256(f"{key}\n{name}".encode("utf-8", "surrogatepass")).digest()
