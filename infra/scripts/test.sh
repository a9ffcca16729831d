#!/usr/bin/env bash
# Runs every test, fast ones first, in one pytest call, and prints pytest's own closing line last.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/pytest -p no:cacheprovider tests/unit tests/contract tests/integration tests/e2e "$@"
