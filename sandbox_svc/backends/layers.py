"""Directories of the embedded runtime: base skeleton, layers, live uppers, trash.

- `layers/<id>` never changes after its rename into place; `run/<seat>/{u,w}` dies with its box.
- All of them lie on one file system, so freezing is a rename.
- Names are short and relative: an overlay's options must fit into one page (4096 bytes).
- Every file belongs to one host id for all sandboxes (root: `HOST_ID`; otherwise the caller),
  so any sandbox may run over any layer.
- Nothing is followed: a hostile link in an upper is data, never a path.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from regreen.rpc.errors import FailedPrecondition, InfraError
from sandbox_svc.backends import linux
from sandbox_svc.backends.base import FULL_BYTES
from sandbox_svc.backends.fds import writing
from sandbox_svc.backends.merge import merge_layers
from sandbox_svc.backends.spread import spread

HOST_ID = 101_000
"""The unprivileged host uid and gid of every sandbox when the service runs as root."""
_OPTION_BYTES = 3_900
_LEAST_INODES = 1000
"""With less than this free, a failed build says nothing about the build."""
_SKELETON_VERSION = "2"
_DIRECTORIES = [
    "dev",
    "proc",
    "sys",
    "tmp",
    "etc",
    "run",
    "opt",
    "srv",
    "mnt",
    "home",
    "root",
    "usr",
    "usr/local",
    "var",
    "var/tmp",
    "var/log",
    "var/lib",
    "var/cache",
    "work",
    "work/repo",
    "work/env",
    "work/home",
    "etc/ssl",
]
_UNFINISHED = (
    "dists/tmp*",
    "dists/*/.new-*",
    "dists/*/.part-*",
    "dists/files/*/.part-*",
    "dists/compiled/*/.part-*",
    "tools/.new-*",
)
"""Names under which the stores beside the layers write before they rename."""
_DIRTY = "w/work/incompat/volatile/dirty"
_WORK = ("w/work/incompat/volatile", "w/work/incompat", "w/work", "w")
"""What overlayfs leaves below a work directory, innermost first."""
WHOLE_TARGETS = (("/dev", True), ("/proc", True), ("/tmp", True))
"""What is mounted over a system that comes from an image, whatever the image has there."""
_WHOLE_DIRECTORIES = ("etc", "work", "work/repo", "work/home")
_WHOLE_FILES = ("passwd", "group", "hosts", "hostname")
_HOST_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_COPIES = [
    "alternatives",
    "ssl/certs",
    "ssl/openssl.cnf",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "protocols",
    "services",
    "mime.types",
    "fonts",
    "pki",
    "ca-certificates.conf",
    "host.conf",
    "gai.conf",
    "maven",
    "gradle",
]
_ETC_FILES = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "regreen:x:1000:1000:regreen:/work/home:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nregreen:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1\tlocalhost regreen\n::1\tlocalhost\n",
    "hostname": "regreen\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "machine-id": "",
    "timezone": "UTC\n",
}


def is_full(path: Path) -> bool:
    """Whether the file system of `path` has no room for work: writes fail, or soon will."""
    return free_bytes(os.statvfs(path)) < FULL_BYTES


def free_bytes(room: os.statvfs_result) -> int:
    """Room for files; none where there are hardly inodes."""
    inodes = room.f_files == 0 or room.f_favail >= _LEAST_INODES
    return room.f_bavail * room.f_frsize if inodes else 0


class Layout:
    """Paths below a runtime's home and the operations on them; blocking, for worker threads."""

    def __init__(self, home: Path, owner: int | None) -> None:
        self.home, self.owner = home, owner
        for name in ("layers", "run", "base", "trash", "stage"):
            (home / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        spread(home / "run")

    def layer(self, layer: str) -> Path:
        """The directory of a layer."""
        return self.home / "layers" / layer

    def box(self, box: str) -> Path:
        """The directory of a live sandbox's first process, by the name of its seat."""
        return self.home / "run" / box

    def own(self, path: Path | str) -> None:
        """Give a path to the sandboxes' host id."""
        if self.owner is not None:
            os.lchown(path, self.owner, self.owner)

    def removed(self, box: str) -> bool:
        """Remove what a box has if it wrote nothing; whether it is gone."""
        root = f"{self.home}/run/{box}"
        try:
            os.rmdir(f"{root}/u")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{root}/{_DIRTY}")
            for name in _WORK:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(f"{root}/{name}")
            os.rmdir(root)
        except OSError:
            return False
        return True

    def freeze(self, box: str) -> str:
        """Turn the unmounted upper of a box into a layer; its id."""
        layer = secrets.token_hex(6)
        root = self.box(box)
        os.rename(root / "u", self.layer(layer))
        os.rename(root, self.home / "trash" / secrets.token_hex(8))
        return layer

    def empty_trash(self) -> None:
        """Remove what was put out of sight."""
        for entry in list((self.home / "trash").iterdir()):
            if not entry.name.startswith("draft-"):
                remove_tree(entry)

    def discard(self, path: Path) -> None:
        """Remove a tree: out of sight at once, then from the disk."""
        hidden = self.home / "trash" / secrets.token_hex(8)
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            return
        remove_tree(hidden)

    def layer_path(self, layer: str) -> Path:
        """Directory of a layer."""
        return self.layer(layer)

    def draft_layer(self) -> Path:
        """A fresh directory that may become a layer."""
        draft = self.home / "trash" / f"draft-{secrets.token_hex(8)}"
        draft.mkdir(mode=0o755)
        self.own(draft)
        return draft

    def adopt_layer(self, draft: Path, layer: str = "") -> str:
        """Turn a directory made by `draft_layer` into a layer; returns its id.

        A given `layer` names the content: if it is there already, the draft goes.
        """
        name = layer or secrets.token_hex(6)
        try:
            os.rename(draft, self.layer(name))
        except OSError as error:
            if not layer or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self.discard(draft)
        return name

    def merge(self, layers: Sequence[Path], beneath: Sequence[Path]) -> str:
        """Make a layer that shows over `beneath` what `layers` show there; its id."""
        draft = self.draft_layer()
        try:
            with writing():
                merge_layers(layers, beneath, draft)
            return self.adopt_layer(draft)
        except BaseException:
            self.discard(draft)
            raise

    def sync(self) -> None:
        """Write the file system that holds the layers to its disk."""
        fd = os.open(self.home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            linux.syncfs(fd)
        finally:
            os.close(fd)

    def sweep(self) -> None:
        """Remove what a predecessor left in `run` and `trash`, and what it did not finish."""
        for pattern in ("run/*", "trash/*", *_UNFINISHED):
            for entry in list(self.home.glob(pattern)):
                remove_tree(entry)

    def lower_names(
        self, below: Sequence[str], layers: Sequence[str], above: Sequence[str] = ()
    ) -> list[str]:
        """Relative lower directories, lowest first."""
        names = [*below, *(f"layers/{layer}" for layer in layers), *above]
        if sum(len(name) + 1 for name in names) > _OPTION_BYTES:
            raise FailedPrecondition(f"{len(layers)} layers are too many; flatten the state")
        return names

    def require(self, layers: Iterable[str]) -> None:
        """Make sure that layers are here, which is not looked at before each of many mounts.

        Raises:
            FailedPrecondition: one is not.
        """
        for layer in layers:
            if not self.layer(layer).is_dir():
                raise FailedPrecondition(
                    f"layer {layer} is not on this host; import or prepare its state again",
                    metadata={"layer": layer},
                )

    def ensure_base(self, *, whole: bool = False) -> str:
        """Build the base skeleton when it is missing; returns its relative name.

        `whole`: what lies below a system that comes from an image.
        """
        if whole:
            tag = hashlib.sha256(_SKELETON_VERSION.encode()).hexdigest()[:10]
            name = f"base/w{tag}"
            if not (self.home / name).is_dir():
                self._build(name, _fill_whole)
            return name
        digest = hashlib.sha256(_SKELETON_VERSION.encode())
        digest.update(_read_or_empty(Path("/etc/ld.so.cache")))
        digest.update(_listing(Path("/etc/alternatives")))
        name = f"base/b{digest.hexdigest()[:10]}"
        if not (self.home / name).is_dir():
            self._build(name, _fill_base)
        return name

    def ensure_targets(self, targets: Iterable[tuple[str, bool]]) -> str:
        """Build a layer with the mount points (absolute path, is a directory)."""
        wanted = tuple(sorted(set(targets)))
        name = _name_of(wanted)
        if not os.path.isdir(f"{self.home}/{name}"):
            self._build(name, lambda root: _fill_targets(root, wanted))
        return name

    def _build(self, name: str, fill: Callable[[Path], None]) -> None:
        draft = self.home / "trash" / f"draft-{secrets.token_hex(8)}"
        draft.mkdir(mode=0o755)
        fill(draft)
        for directory, folders, files in os.walk(draft):
            for entry in (*folders, *files):
                self.own(os.path.join(directory, entry))
        self.own(draft)
        try:
            os.rename(draft, self.home / name)
        except OSError as error:
            remove_tree(draft)
            if not (self.home / name).is_dir():
                raise InfraError(f"cannot build the base file system: {error}") from error


@lru_cache(maxsize=1024)
def _name_of(targets: tuple[tuple[str, bool], ...]) -> str:
    return f"base/t{hashlib.sha256(repr(list(targets)).encode()).hexdigest()[:10]}"


def _read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _listing(path: Path) -> bytes:
    try:
        return repr(sorted((entry.name, os.readlink(entry)) for entry in path.iterdir())).encode()
    except OSError:
        return b""


def _fill_base(root: Path) -> None:
    for name in _DIRECTORIES:
        (root / name).mkdir(mode=0o755, exist_ok=True)
    (root / "var/tmp").chmod(0o1777)
    for name in _HOST_LINKS:
        host = Path("/") / name
        if host.is_symlink():
            (root / name).symlink_to(os.readlink(host))
        elif host.is_dir():
            (root / name).mkdir()
    etc = root / "etc"
    java = [entry.name for entry in Path("/etc").glob("java*")]
    for name in (*_ETC_COPIES, *java):
        _copy(Path("/etc") / name, etc / name)
    for name, text in _ETC_FILES.items():
        (etc / name).write_text(text)
    (etc / "localtime").symlink_to("/usr/share/zoneinfo/UTC")
    (etc / "mtab").symlink_to("/proc/self/mounts")
    (root / "var/run").symlink_to("/run")
    (etc / "resolv.conf").touch()


def _fill_whole(root: Path) -> None:
    """What a system from an image may lack: a user, a home, a name for itself."""
    for name in _WHOLE_DIRECTORIES:
        (root / name).mkdir(mode=0o755)
    for name in _WHOLE_FILES:
        (root / "etc" / name).write_text(_ETC_FILES[name])


def _copy(source: Path, target: Path) -> None:
    """Copy public configuration, leaving out what this user may not read."""
    if source.is_dir():
        shutil.copytree(
            source, target, symlinks=True, ignore_dangling_symlinks=True, ignore=_unreadable
        )
    elif source.is_file() and os.access(source, os.R_OK):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _unreadable(directory: str, names: list[str]) -> set[str]:
    left_out = set()
    for name in names:
        mode = os.lstat(os.path.join(directory, name)).st_mode
        public = stat.S_ISLNK(mode) or (mode & stat.S_IROTH and not stat.S_ISFIFO(mode))
        if not public:
            left_out.add(name)
    return left_out


def _fill_targets(root: Path, targets: Sequence[tuple[str, bool]]) -> None:
    for target, directory in targets:
        place = root / target.strip("/")
        if directory:
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
        else:
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            place.touch(0o644)


def remove_tree(path: Path) -> None:
    """Remove a tree that nothing uses any more, however deep or unreadable it is."""
    stack: list[tuple[str, bool]] = [(str(path), False)]
    try:
        while stack:
            here, emptied = stack.pop()
            if emptied:
                os.rmdir(here)
                continue
            if not stat.S_ISDIR(os.lstat(here).st_mode):
                os.unlink(here)
                continue
            _make_enterable(here)
            stack.append((here, True))
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        stack.append((entry.path, False))
                    else:
                        os.unlink(entry.path)
    except FileNotFoundError:
        return
    except OSError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["/bin/rm", "-rf", "--one-file-system", "--", str(path)],
                check=False,
                capture_output=True,
                timeout=600,
            )


def _make_enterable(directory: str) -> None:
    if os.lstat(directory).st_mode & 0o700 != 0o700:
        os.chmod(directory, 0o700)
