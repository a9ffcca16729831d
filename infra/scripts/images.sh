#!/usr/bin/env bash
# Builds the images of the services, regreen-NAME:TAG, from a wheelhouse that is made here first: no image asks a package index.
# Usage: images.sh [NAME...]; all but sglang, whose base is 20 GB, without names.
#   BASE_IMAGE   what regreen-base stands on (infra/docker/base.Dockerfile)
#   BUILD_ARGS   further words for every `docker build`, for example "--network host"
#   TAG          of the images; default latest
#   ENGINE       docker (default) or podman
set -euo pipefail
cd "$(dirname "$0")/../.."
all=(dataset judge policy learner sandbox rollout)
engine=${ENGINE:-docker} tag=${TAG:-latest}
names=("$@")
[ $# -gt 0 ] || names=("${all[@]}")
read -ra words <<<"${BUILD_ARGS:-}"
# The context is only what a Dockerfile takes: the wheels of one service, not those of all.
build() { # NAME BASE FILE...
  local name=$1 base=$2; shift 2
  echo "images: regreen-$name:$tag"
  tar -c --exclude=__pycache__ --exclude=spawner/built "infra/docker/$name.Dockerfile" "$@" |
    "$engine" build --quiet ${words[@]+"${words[@]}"} --build-arg "BASE_IMAGE=$base" --tag "regreen-$name:$tag" \
      --file "infra/docker/$name.Dockerfile" - >/dev/null
}
if [ "${names[*]}" != sglang ]; then build base "${BASE_IMAGE:-debian:bookworm-slim}"; fi
for name in "${names[@]}"; do
  if [ "$name" = sglang ]; then build sglang "${SGLANG_IMAGE:-lmsysorg/sglang:v0.5.23}" infra/docker/sbom.py; continue; fi
  files=$(.venv/bin/python infra/scripts/wheelhouse.py "$name")
  mapfile -t wheels <<<"$files"
  source=("${name}_svc"); [ "$name" != rollout ] || source=()
  build "$name" "regreen-base:$tag" infra/docker/packages.sh infra/docker/sbom.py regreen ${source[@]+"${source[@]}"} "${wheels[@]}"
done
