#!/usr/bin/env bash
# Regenerates the Python stubs under regreen/<area>/v1 from proto/. The generator is pinned low on purpose:
# new gencode refuses an old runtime, old gencode runs on every newer one. Usage: proto.sh [OUTPUT_ROOT]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root}
uv=${UV:-$root/.venv/bin/uv}
mapfile -t files < <(cd "$root/proto" && find regreen -name '*.proto' | sort)
run() {
  "$uv" run --quiet --no-project --isolated --python "${PYTHON:-$root/.venv/bin/python}" \
    --with grpcio-tools==1.81.1 --with mypy-protobuf==5.1.0 --with 'protobuf<7' --with 'setuptools<81' \
    --with googleapis-common-protos==1.76.0 "$@"
}
run python -m grpc_tools.protoc -I "$root/proto" --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" "${files[@]}"
run python "$root/infra/scripts/proto_exports.py" "$out"
