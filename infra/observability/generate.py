"""Writes what is made here: dashboards as Grafana reads them, and the chart's copy of the alerts.

- `--check` writes nothing and fails where a file differs from what it would write.
- A chart holds only files below its own folder, hence the copy.
- Panels stand in two columns, in the order of `panels`; each is one line of its file.
"""

import json
import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos
from panels import DASHBOARDS, PRICES, Panel

HERE = Path(__file__).resolve().parent
CHART_ALERTS = HERE.parent / "helm" / "regreen" / "files" / "alerts.yml"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT = 12, 8


def built(panel: Panel, place: int) -> Any:
    """A panel at its place."""
    made: Any = stat.Panel() if panel.stat else timeseries.Panel()
    x, y = place % 2 * WIDTH, place // 2 * HEIGHT
    made.id(place + 1).title(panel.title).description(panel.about).unit(panel.unit)
    made.datasource(SOURCE).grid_pos(GridPos(h=HEIGHT, w=WIDTH, x=x, y=y))
    for number, (expr, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expr).ref_id(chr(ord("A") + number))
        made.with_target(query.legend_format(legend or panel.title))
    return made


def rendered(name: str) -> str:
    """The file of a dashboard."""
    title, panels = DASHBOARDS[name]
    made = dashboard.Dashboard(title).uid(f"regreen-{name}").tags(["regreen"])
    made.refresh("30s").time("now-3h", "now")
    made.with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    for price, usual in PRICES.items() if name == "cost" else ():
        box = dashboard.TextBoxVariable(price).label(price.replace("_", " "))
        made.with_variable(box.default_value(usual))
    for place, panel in enumerate(panels):
        made.with_panel(built(panel, place))
    found = json.loads(JSONEncoder(sort_keys=True).encode(made.build()))
    lines = [json.dumps(panel, sort_keys=True) for panel in found.pop("panels")]
    rest = json.dumps(found, indent=1, sort_keys=True)
    return '{"panels": [\n' + ",\n".join(lines) + "\n]," + rest[1:] + "\n"


def main() -> int:
    """Write, or compare."""
    files = {HERE / "dashboards" / f"{name}.json": rendered(name) for name in DASHBOARDS}
    files[CHART_ALERTS] = (HERE / "alerts.yml").read_text()
    if sys.argv[1:] == ["--check"]:
        old = [
            path for path, text in files.items() if not path.exists() or path.read_text() != text
        ]
        for path in old:
            print(f"{path.relative_to(HERE.parents[1])}: differs; `make dashboards` writes it anew")
        return 1 if old else 0
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
