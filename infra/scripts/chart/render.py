"""Renders the chart by Helm's own SDK, and overlays by kubectl; nothing asks a cluster.

- Values are checked by values.schema.json as `helm install` does, before anything is rendered.
- Values given lie over those of values.yaml, key by key, as with `helm --values`.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm" / "regreen"
NAMESPACE = "regreen"


class Refused(Exception):
    """Helm refuses values or cannot render them."""


class _Loader(yaml.CSafeLoader):
    """Refuses a mapping with one key twice, of which YAML's readers take either."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping.

        Raises:
            ConstructorError: a key is there twice.
        """
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            said = f"{', '.join(twice)} is there twice"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return dict(super().construct_mapping(node, deep=deep))


class Chart:
    """The chart, loaded once."""

    def __init__(self, path: Path = CHART) -> None:
        self._chart = helm.Chart.load(str(path))

    def texts(
        self, values: dict[str, Any], *, name: str = "regreen", upgrade: bool = False
    ) -> dict[str, str]:
        """What these values make of each template.

        Raises:
            Refused: by schema or template.
        """
        try:
            rendered = self._chart.render(
                values, name=name, namespace=NAMESPACE, is_install=not upgrade, is_upgrade=upgrade
            )
        except helm.HelmError as error:
            raise Refused(str(error)) from error
        return {path: text for path, text in sorted(rendered.items()) if path.endswith(".yaml")}

    def objects(self, values: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        """The objects that these values make.

        Raises:
            Refused: as `texts`, or what was rendered is no YAML.
        """
        texts = self.texts(values, **options)
        return [obj for path, text in texts.items() for obj in parse(text, path)]


def as_set(values: dict[str, Any]) -> Chart:
    """The chart with the whole numbers of these values of the type that `helm --set` gives them.

    - Those of a file, and all that this SDK takes, are float64 in templates; of `--set`, int64.
    """
    lines = []
    for path, number in _whole(values):
        *parents, last = map(json.dumps, path)
        place = f"(index .Values {' '.join(parents)})"
        lines.append(f"{{{{- $_ := set {place} {last} (int64 {number}) }}}}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "regreen"
        shutil.copytree(CHART, copy)
        first = copy / "templates" / "set" / "numbers.tpl"  # deeper ones are rendered first
        first.parent.mkdir()
        first.write_text("".join(lines))
        return Chart(copy)


def _whole(at: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(at, dict):
        for key, value in at.items():
            yield from _whole(value, (*path, key))
    elif isinstance(at, int) and not isinstance(at, bool):
        yield path, at


def parse(text: str, path: str) -> list[dict[str, Any]]:
    """Objects of a YAML stream.

    Raises:
        Refused: it is no YAML.
    """
    try:
        return [obj for obj in yaml.load_all(text, Loader=_Loader) if obj]
    except yaml.YAMLError as error:
        raise Refused(f"{path}: {error}") from error


def read_values(path: Path) -> dict[str, Any]:
    """A file of values."""
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader) or {}


def lint() -> list[str]:
    """What `helm lint --strict` finds; an icon is not missed."""
    found = helm.lint(str(CHART), read_values(CHART / "ci" / "full.yaml"), strict=True)
    return [
        f"{item['path']}: {item['error']}"
        for item in found["messages"]
        if "icon is recommended" not in item["error"]
    ] + found["errors"]


def kustomized(overlay: Path, objects: list[dict[str, Any]], kubectl: str) -> str:
    """An overlay over rendered objects, which are written beside it.

    Raises:
        Refused: by kustomize.
    """
    (overlay / "rendered.yaml").write_text(yaml.safe_dump_all(objects, sort_keys=False))
    done = subprocess.run(
        [kubectl, "kustomize", str(overlay)], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise Refused(done.stderr.strip())
    return done.stdout
