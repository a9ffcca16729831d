"""Buckets by S3, with credentials from files where the URL names a folder of them.

- `s3://bucket/prefix?secrets=/folder`: the folder has one file for each variable, named as it
  (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, ...), as a Secret
  that is mounted has. Keys are read anew all the time, so that they may be renewed.
- What the folder does not say comes from the environment; where neither has keys, the machine's
  identity is used (a web identity's token, a metadata service).
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from obstore.store import S3Store

from regreen.rpc.errors import InvalidArgument, Unavailable

_KEYS = {
    "AWS_ACCESS_KEY_ID": "access_key_id",
    "AWS_SECRET_ACCESS_KEY": "secret_access_key",
    "AWS_SESSION_TOKEN": "token",
}
"""Files whose content may change, and what obstore calls it."""
_NEEDED = ("access_key_id", "secret_access_key")
_SETTINGS = {
    "AWS_REGION": "region",
    "AWS_DEFAULT_REGION": "default_region",
    "AWS_ENDPOINT_URL": "endpoint",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "virtual_hosted_style_request",
}
_PLAIN = "AWS_ALLOW_HTTP"
"""For stores without TLS: `true`."""
_HELD = timedelta(seconds=1)
"""obstore asks for keys anew that end within minutes, which these always do."""


def secrets_folder(url: str) -> str:
    """The folder of credentials that a URL of a bucket names; empty where it names none.

    Raises:
        InvalidArgument: it has another parameter, or the folder is no absolute path.
    """
    asked = parse_qs(urlsplit(url).query, keep_blank_values=True)
    folders = asked.pop("secrets", [""])
    if asked or len(folders) > 1:
        raise InvalidArgument(
            "blobs.url", f"has the parameters {sorted(asked)}", "give ?secrets=/folder alone"
        )
    if "secrets" in urlsplit(url).query and not folders[0].startswith("/"):
        raise InvalidArgument(
            "blobs.url", f"secrets is {folders[0]!r}", "name a folder by its whole path"
        )
    return folders[0]


def open_bucket(url: str) -> S3Store:
    """The bucket at `s3://bucket/prefix` with its credentials.

    Raises:
        InvalidArgument: the URL, or a file of the folder that it names, cannot be used.
    """
    folder = secrets_folder(url)
    bare = urlunsplit(urlsplit(url)._replace(query=""))
    if not folder:
        return S3Store.from_url(bare)
    found = Folder(Path(folder))
    given: Any = {"config": found.settings(), "client_options": {"allow_http": found.plain()}}
    if found.has_keys():
        given["credential_provider"] = found
    return S3Store.from_url(bare, **given)


class Folder:
    """Credentials and settings of a bucket, one a file.

    Raises:
        InvalidArgument: it cannot be read, or has a file that nobody reads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            names = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise InvalidArgument(
                "blobs.url",
                f"the folder {path} of its credentials cannot be read ({error.strerror})",
                "mount a Secret with files AWS_... there",
            ) from error
        # What Kubernetes adds to a mounted Secret begins with a dot.
        self._names = [name for name in names if not name.startswith(".")]
        known = (*_KEYS, *_SETTINGS, _PLAIN)
        if unknown := [name for name in self._names if name not in known]:
            raise InvalidArgument(
                "blobs.url", f"{path} has a file {unknown[0]!r}", f"use {', '.join(known)}"
            )

    def settings(self) -> dict[str, str]:
        """All but the keys; it does not change while the service runs."""
        return {_SETTINGS[name]: self._read(name) for name in self._names if name in _SETTINGS}

    def plain(self) -> bool:
        """Whether the store may be asked without TLS."""
        return _PLAIN in self._names and self._read(_PLAIN).lower() == "true"

    def has_keys(self) -> bool:
        """Whether there are keys of its own; with one half of them there should be.

        Raises:
            InvalidArgument: one of them is missing.
        """
        there = [_KEYS[name] for name in self._names if name in _KEYS]
        missing = [name for name, key in _KEYS.items() if key in _NEEDED and key not in there]
        if there and missing:
            raise InvalidArgument(
                "blobs.url", f"{self._path} has no file {missing[0]}", "give both parts of a key"
            )
        return bool(there)

    def __call__(self) -> Any:
        """The keys as they are now, for obstore.

        Raises:
            Unavailable: they cannot be read now.
        """
        try:
            keys = {_KEYS[n]: self._read(n) for n in _KEYS if (self._path / n).exists()}
        except OSError as error:
            raise Unavailable(
                f"the credentials in {self._path} cannot be read: {error.strerror}"
            ) from error
        return {"token": None, **keys, "expires_at": datetime.now(UTC) + _HELD}

    def _read(self, name: str) -> str:
        return (self._path / name).read_text("utf-8").strip()
