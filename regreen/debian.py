"""Upstream archives as Debian keeps them: where they lie, and whose mirror is asked.

- The mirror is the user's own: REGREEN_DEBIAN_MIRROR, else what apt is set up with. None is built
  in; without one nothing is asked.
- An archive is named as Debian names it, `SOURCE_VERSION.orig.tar.gz`, and told by its sha256 like
  any other file; its place in the pool follows from its name.
- A mirror keeps what its suites hold: an archive that was superseded there is gone.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ORIGINAL = re.compile(r"^([a-z0-9][a-z0-9.+-]+)_([A-Za-z0-9.+]+)\.orig\.tar\.(?:gz|xz|bz2)$")
_APT = Path("/etc/apt")
_LINE = re.compile(r"^\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(https?://\S+)\s+\S+\s+.*\bmain\b")


def mirror(env: Mapping[str, str] | None = None, apt: Path = _APT) -> str:
    """Address of the Debian mirror to ask; empty if there is none."""
    env = os.environ if env is None else env
    named = env.get("REGREEN_DEBIAN_MIRROR", "").strip()
    return (named or next(_of_apt(apt), "")).rstrip("/")


def _of_apt(apt: Path) -> Iterator[str]:
    """Addresses of archives called `debian` in apt's settings."""
    for path in sorted([*apt.glob("*.list"), *apt.glob("sources.list.d/*")]):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        urls = [match[1] for line in text.splitlines() if (match := _LINE.match(line))]
        for line in text.splitlines():
            if line.lower().startswith("uris:"):
                urls += line.partition(":")[2].split()
        yield from (url for url in urls if url.rstrip("/").endswith("/debian"))


def upstream_version(filename: str) -> str:
    """The upstream version that an archive's name holds; empty if it is no such archive."""
    match = ORIGINAL.match(filename)
    if match is None:
        return ""
    return re.sub(r"\+(?:dfsg|ds|repack|debian).*$", "", match[2])


def pool_url(filename: str, base: str) -> str:
    """Where an archive lies on a mirror; empty if it is no such archive or there is no mirror."""
    match = ORIGINAL.match(filename)
    if match is None or not base:
        return ""
    source = match[1]
    folder = source[:4] if source.startswith("lib") else source[0]
    return f"{base}/pool/main/{folder}/{source}/{filename}"
