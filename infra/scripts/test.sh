#!/usr/bin/env bash
# Runs every test, fast ones first, in one pytest call, and prints those that took longest and pytest's own closing line last.
# A test file runs in one process and in order. Tests wait more than they compute: three processes keep two
# cores busy; PYTEST_ARGS="-n 0" runs all of them in one. The longest files, those of tests/e2e,
# do not come last, so that no process waits for another's last file.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE  # a process that compiles what it imports takes twice as long, and there are thousands
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/pytest -p no:cacheprovider -n 3 --dist loadfile --no-loadscope-reorder \
  --durations=20 --durations-min=20 tests/unit tests/contract tests/e2e tests/integration "$@"
