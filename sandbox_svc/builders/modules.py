"""Which module an entry of a folder gives, and before which others Python takes it.

- In one folder a package wins over a library, that over source, and that over bare byte code.
- A link counts by its own name: nobody knows any more where it led.
"""

from collections.abc import Collection, Iterable, Iterator

LIBRARY = (".so", ".pyd")
BYTE_CODE = (".pyc", ".pyo")
CODE = (".py", *LIBRARY, *BYTE_CODE)
SOURCE_FOLDERS = ("src", "lib")


def may_be_link(path: str) -> bool:
    """Whether only a link, and no file, of this name would be a module."""
    return "." not in path.rpartition("/")[2]


def given(path: str) -> tuple[str, str] | None:
    """The folder and the name of the module that Python would find in an entry, if any."""
    folder, _, name = path.rpartition("/")
    if "__pycache__" in folder.split("/") or not (name.endswith(CODE) or may_be_link(path)):
        return None
    module = name.partition(".")[0]
    if module == "__init__":
        folder, _, module = folder.rpartition("/")
    return (folder, module) if module.isidentifier() else None


def module_of(path: str) -> str:
    """The whole name of the module that an entry would be, from the folder that it is found in."""
    found = given(path)
    return ".".join(filter(None, (found[0].replace("/", "."), found[1]))) if found else ""


def top_modules(place: str, files: Iterable[str], foreign: Collection[str]) -> set[str]:
    """Modules that a folder has, of these files with code.

    A folder that is no package counts unless it has the name of a foreign module, before which
    Python would not take it.
    """
    prefix, found = (f"{place}/" if place else ""), set()
    for path in files:
        if path.startswith(prefix):
            name, below, rest = path[len(prefix) :].partition("/")
            whole = not below or ("/" not in rest and rest.partition(".")[0] == "__init__")
            module = name if below else name.partition(".")[0]
            if whole or module not in foreign:
                found.add(module)
    return {name for name in found if name.isidentifier()}


def hidden(path: str) -> Iterator[str]:
    """Modules that Python would not take any more if this entry is new."""
    found = given(path)
    if found is None:
        return
    place, name = (f"{found[0]}/" if found[0] else ""), found[1]
    inside = path.rpartition("/")[2].startswith("__init__.")
    if inside or not path.endswith((".py", *BYTE_CODE)):
        yield f"{place}{name}.py"
    if inside and path.endswith(LIBRARY):
        yield f"{place}{name}/__init__.py"


def as_source(path: str) -> str:
    """The source file in whose place a library would be; any other path as it is."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}.py" if name.endswith(LIBRARY) else path


def source_of(path: str) -> str:
    """The file that byte code is of; any other path as it is."""
    folder, _, name = path.rpartition("/")
    if not name.endswith(BYTE_CODE):
        return path
    return f"{folder.removesuffix('/__pycache__')}/{name.partition('.')[0]}.py"


def folders_of(path: str) -> Iterator[str]:
    """All folders that a path lies in, nearest first; the repository itself is empty."""
    while path:
        path = path.rpartition("/")[0]
        yield path
