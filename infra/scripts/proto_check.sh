#!/usr/bin/env bash
# Lints the contracts, regenerates the stubs and compares them with the committed ones, and looks for breaking changes
# against the golden descriptor of the last release (proto/golden/v1.binpb).
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
.venv/bin/buf lint proto && echo "ok    buf lint"
.venv/bin/buf format --diff --exit-code proto >/dev/null && echo "ok    buf format" || { echo "FAIL  buf format: run make fmt"; exit 1; }
.venv/bin/buf breaking proto --against proto/golden/v1.binpb && echo "ok    buf breaking"
infra/scripts/proto.sh "$work"
drift=0
for area in "$work"/regreen/*/v1; do
  diff -rq -x __pycache__ "$area" "regreen/${area#"$work"/regreen/}" || drift=1
done
[ "$drift" = 0 ] && echo "ok    stubs match proto/" || { echo "FAIL  stubs differ from proto/: run make proto"; exit 1; }
