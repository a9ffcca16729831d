#!/usr/bin/env bash
# Lints the contracts, regenerates the stubs and compares them with the committed ones, and looks for breaking changes
# against the golden descriptor of the last release (proto/golden/v1.binpb). Usage: proto_check.sh [PROTO_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
proto=${1:-proto}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
failed=0
step() {  # NAME REMEDY COMMAND...; a list such as `command && echo` would hide a failure from `set -e`
  if "${@:3}"; then echo "ok    $1"; else echo "FAIL  $1: $2"; failed=1; fi
}
drift() {
  infra/scripts/proto.sh "$work" || return 1
  local area same=0
  for area in "$work"/regreen/*/v1; do
    diff -rq -x __pycache__ "$area" "regreen/${area#"$work"/regreen/}" || same=1
  done
  return "$same"
}
step "buf lint" "mend what it names" .venv/bin/buf lint "$proto"
step "buf format" "run make fmt" .venv/bin/buf format --diff --exit-code "$proto"
step "buf breaking" "keep what is released" .venv/bin/buf breaking "$proto" --against proto/golden/v1.binpb
[ "$proto" != proto ] || step "stubs match proto/" "run make proto" drift
exit "$failed"
