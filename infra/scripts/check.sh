#!/usr/bin/env bash
# Format, lint, types, import rules, file length and the tables of the docs that are made. Contracts are checked by proto_check.sh.
set -uo pipefail
cd "$(dirname "$0")/../.."
failed=()
step() { local name=$1; shift; if "$@"; then echo "ok    $name"; else echo "FAIL  $name"; failed+=("$name"); fi; }
step "format" .venv/bin/ruff format --check --quiet .
step "lint" .venv/bin/ruff check --quiet .
step "types" .venv/bin/mypy
step "imports" .venv/bin/lint-imports --no-cache
step "file length" .venv/bin/python infra/scripts/file_length.py
step "settings in docs" .venv/bin/python infra/scripts/settings_table.py --check
step "data card in docs" .venv/bin/python infra/scripts/data_card.py --check
step "chart's settings" .venv/bin/python infra/scripts/chart_schema.py --check
step "chart's values in docs" .venv/bin/python infra/scripts/chart_values.py --check
step "compose.yaml" .venv/bin/python infra/scripts/compose.py --check
step "dashboards and alerts" .venv/bin/python infra/observability/generate.py --check
step "seccomp profile" .venv/bin/python infra/scripts/seccomp_profile.py --check
[ ${#failed[@]} -eq 0 ] || { echo "check failed: ${failed[*]}"; exit 1; }
