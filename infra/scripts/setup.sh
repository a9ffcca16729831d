#!/usr/bin/env bash
# Installs everything into .venv from pinned requirements. Safe to run again, also twice at a time; ends with a stamp file.
# Every package has its hash checked, uv and what builds the one source release and regreen itself included. The exceptions:
# torch is pinned by version alone, because each index has its own build of it, and where that is the CUDA build, the
# libraries that only it needs are pinned by torch; pip is the one that comes with Python.
# The requirements are pinned for Python 3.11 and tested with it alone. REGREEN_PYTHON names the interpreter; default: the first
# of python3.11 and python3 that is a 3.11, else one that uv fetches (from its own place, which a mirror of packages may lack).
set -euo pipefail
cd "$(dirname "$0")/../.."
bold='' plain=''; [ ! -t 2 ] || [ -n "${NO_COLOR:-}" ] || { bold=$'\033[1m'; plain=$'\033[0m'; }
say() { printf '%s[setup]%s %s\n' "$bold" "$plain" "$*" >&2; }

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
    "$tools/venv/bin/python" -m pip --disable-pip-version-check install --quiet --require-hashes -r <(pin_of uv) >&2 &&
    "$tools/venv/bin/uv" python install --no-bin 3.11 >&2 &&
    "$tools/venv/bin/uv" python find --managed-python 3.11
)

pin_of() { awk -v name="$1==" 'index($0, name) == 1 { on = 1 } on { print; if (!/\\$/) exit }' requirements/lock.txt; }  # with its hashes

waiting() (  # says that it goes on, every 15 s, until it is ended
  trap 'kill $!; exit' TERM
  while sleep 15 >/dev/null 2>&1 & wait $! && kill -0 $$ 2>/dev/null; do say "    ... $SECONDS s"; done
) 9>&-

exec 9>.setup.lock  # it stays: whoever removed it would let a third setup run beside one that waits for it
flock -n 9 || { say "another setup is at work here; waiting for it"; flock 9; }
if ! is_311 .venv/bin/python; then
  python=$(pick_python)
  say "creating .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv 2>/dev/null || { rm -rf .venv; "$python" -m pip --version >/dev/null && "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install -q pip; }
fi
waiting & clock=$!
trap 'kill $clock' EXIT
pip() { .venv/bin/python -m pip --disable-pip-version-check install "$@" 2> >(grep -v 'WARNING: Location' >&2); }
uv() { .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps "$@"; }
locked() { uv --require-hashes --build-constraint requirements/lock.txt -r "requirements/$1.txt"; }  # deepspeed is built here
say "1/4 installer"
pip --quiet --require-hashes -r <(pin_of uv)
say "2/4 packages: 460 MB, half a minute at 150 Mbit/s"
locked lock
.venv/bin/uv pip uninstall --quiet --python .venv/bin/python openvino-telemetry 2>/dev/null || true  # of former set-ups: it reports to Google
locked model
[ "${REGREEN_PEERS:-1}" = 0 ] || locked peer
if ! .venv/bin/python -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13.0"))' 2>/dev/null; then
  say "3/4 torch: 190 MB as a CPU build, some GB and so the longest with CUDA; pip takes what its index has"
  torch() { pip --no-compile torch==2.13.0; }  # compiling all of it takes longer than the rest; what is imported is compiled then
  if [ -t 1 ]; then torch; else torch | { grep --line-buffered -E '^ *(Processing|Downloading|Installing)' || [ $? = 1 ]; }; fi
fi
say "4/4 regreen itself"
uv --build-constraint requirements/build.txt --editable .
spawner() { .venv/bin/python -m sandbox_svc.backends.program; }
if ! spawner >/dev/null 2>&1; then
  say "    no C compiler that works for the sandbox's first process: fetching one, 90 MB, and building with it takes a minute"
  locked compiler
  spawner >/dev/null
fi
touch .venv/.regreen-setup
say "done in $SECONDS s"
