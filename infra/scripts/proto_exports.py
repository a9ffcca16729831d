"""Writes the `__init__.py` of every generated package, so that callers import messages by area.

- `from regreen.sandbox import v1 as sandbox_pb` gives every message, enum, enum value and stub.
- Output depends on the descriptors alone, so that regenerating it shows no difference.
"""

import importlib
import sys
from pathlib import Path

HEADER = '"""Generated from proto/ by `make proto`; do not edit."""\n\n'


def exports(module_name: str) -> list[str]:
    """Public top-level names that one generated module defines."""
    descriptor = importlib.import_module(module_name).DESCRIPTOR
    names = [*descriptor.message_types_by_name, *descriptor.enum_types_by_name]
    for enum in descriptor.enum_types_by_name.values():
        names += enum.values_by_name
    return sorted(names)


def service_exports(module_name: str) -> list[str]:
    """Stubs, servicer bases and registration functions that one generated module defines."""
    descriptor = importlib.import_module(module_name.removesuffix("_grpc")).DESCRIPTOR
    return sorted(
        name
        for service in descriptor.services_by_name
        for name in (f"{service}Servicer", f"{service}Stub", f"add_{service}Servicer_to_server")
    )


def write_package(root: Path, package: Path) -> None:
    """Write the re-exports of one `v1` directory."""
    lines: list[str] = []
    public: list[str] = []
    for path in sorted(package.glob("*_pb2*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        names = service_exports(module) if path.stem.endswith("_grpc") else exports(module)
        if names:
            body = "".join(f"    {name},\n" for name in names)
            lines.append(f"from {module} import (\n{body})\n")
            public += names
    listed = "".join(f'    "{name}",\n' for name in sorted(public))
    (package / "__init__.py").write_text(HEADER + "".join(lines) + f"\n__all__ = [\n{listed}]\n")
    parent = package.parent / "__init__.py"
    parent.write_text(HEADER.rstrip("\n") + "\n")


def main() -> None:
    """Write every package below the output root given on the command line."""
    root = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(root))
    packages = sorted({path.parent for path in root.glob("regreen/*/v1/*_pb2.py")})
    for package in packages:
        for directory in (package, package.parent):
            (directory / "__init__.py").write_text(HEADER.rstrip("\n") + "\n")
    for package in packages:
        write_package(root, package)


if __name__ == "__main__":
    main()
