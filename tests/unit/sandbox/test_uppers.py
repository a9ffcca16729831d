"""What an upper directory tells, against a model of the layers: no difference is left out."""

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_svc.backends import uppers

_NAMES = ("a", "b")
_PATHS = (*_NAMES, *(f"{one}/{two}" for one in _NAMES for two in _NAMES), "a/a/a")
_KINDS = ("file", "folder", "link", "opaque", "whiteout")
_LAYER = st.dictionaries(st.sampled_from(_PATHS), st.sampled_from(_KINDS), max_size=5)
Layer = dict[str, str]


def _lay_out(top: Path, layer: Layer) -> None:
    """Make a layer's directory; what would lie below something else than a folder is left out."""
    top.mkdir()
    for path, kind in sorted(layer.items()):
        here = top / path
        parents = [top / Path(*Path(path).parts[:n]) for n in range(1, len(Path(path).parts))]
        if any(os.path.lexists(parent) and not _is_folder(parent) for parent in parents):
            continue
        here.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(here):
            continue
        match kind:
            case "file":
                here.write_text(f"{top.name} {path}")
            case "folder" | "opaque":
                here.mkdir()
                if kind == "opaque":
                    os.setxattr(here, "user.overlay.opaque", b"y")
            case "link":
                here.symlink_to("/nowhere")
            case "whiteout":
                os.mknod(here, stat.S_IFCHR | 0o644, os.makedev(0, 0))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _merged(layers: Sequence[Path], under: str = "") -> dict[str, tuple[str, str]]:
    """Each path that a mount of the layers shows: folder, or which layer's what it is."""
    found: dict[str, tuple[str, str]] = {}
    names = {entry.name for layer in layers for entry in _entries(layer / under)}
    for name in names:
        path = f"{under}/{name}" if under else name
        stack: list[Path] = []
        for layer in reversed(layers):
            here = layer / path
            if not os.path.lexists(here):
                continue
            if not _is_folder(here):
                if not stack and not stat.S_ISCHR(here.lstat().st_mode):
                    found[path] = ("other", layer.name)
                break
            stack.append(layer)
            if _is_opaque(here):
                break
        if stack:
            found[path] = ("folder", "")
            found.update(_merged(stack[::-1], path))
    return found


def _kind(shown: dict[str, tuple[str, str]], path: str) -> str:
    return shown.get(path, ("nothing", ""))[0]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder)) if _is_folder(folder) else []


def _is_opaque(folder: Path) -> bool:
    return "user.overlay.opaque" in os.listxattr(folder)


def _may_make_whiteouts() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(f"{folder}/w", stat.S_IFCHR | 0o644, os.makedev(0, 0))
            os.setxattr(folder, "user.overlay.opaque", b"y")
        except OSError:
            return False
    return True


@pytest.mark.skipif(not _may_make_whiteouts(), reason="no whiteouts without root")
@settings(max_examples=400, deadline=None)
@given(st.lists(_LAYER, min_size=1, max_size=3), _LAYER)
def test_every_path_that_differs_is_named(below: list[Layer], above: Layer) -> None:
    with tempfile.TemporaryDirectory() as name:
        layers = [Path(name, f"l{number}") for number in range(len(below))]
        upper = Path(name, "upper")
        for place, layer in zip([*layers, upper], [*below, above], strict=True):
            _lay_out(place, layer)
        before, after = _merged(layers), _merged([*layers, upper])
        differ = {p for p in {*before, *after} if before.get(p) != after.get(p)}
        wanted = {f"/{p}" for p in differ if "other" in (_kind(before, p), _kind(after, p))}
        new = {p for p in differ if _kind(after, p) == "folder" and p not in before}
        wanted |= {f"/{p}/." for p in new if not any(q.startswith(f"{p}/") for q in after)}
        assert wanted <= uppers.changed([upper], layers, "/")
