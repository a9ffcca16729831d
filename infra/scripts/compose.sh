#!/usr/bin/env bash
# compose.sh up|down|WORDS: runs compose.yaml with whichever Compose is here, and has the commands of REGREEN_HOME use it.
# `up` ends when everything is healthy; GPU=1 MODEL=DIR starts SGLang too, PORTS=any publishes free ports. Other words go to Compose, for example `logs -f dataset`.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=${REGREEN_HOME:-$PWD/build/home}
shown=$home/docker  # what the commands of this machine show to the services
if docker compose version >/dev/null 2>&1; then tool=(docker compose)
elif command -v docker-compose >/dev/null; then tool=(docker-compose)
else echo "compose: there is neither docker compose nor docker-compose; install one" >&2; exit 3; fi
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-regreen}
compose() { "${tool[@]}" -f compose.yaml "$@"; }
elsewhere() { .venv/bin/python -m regreen.stack.elsewhere --home "$home" "$@"; }

missing() {
  local image
  for image in $(compose config | sed -n 's/^ *image: *//p' | grep -E '^regreen-' | grep -v '^regreen-sglang' | sort -u); do
    docker image inspect "$image" >/dev/null 2>&1 || { image=${image#regreen-}; echo "${image%%:*}"; }
  done
}

# Compose 1.29 waits for nothing but what another container depends on. As long as the longest start_period of compose.yaml: of SGLang, which loads a model.
await_health() {
  local states left give_up=$((SECONDS + ${GPU:+1600}+300))
  while states=$(compose ps -q | xargs docker inspect --format '{{.Name}} is {{.State.Health.Status}}'); do
    left=$(grep -v ' is healthy$' <<<"$states") || return 0
    if [ $SECONDS -ge $give_up ] || grep -q ' is unhealthy$' <<<"$left"; then break; fi
    sleep 1
  done
  echo "compose: ${left:-no container}; look at infra/scripts/compose.sh logs" >&2
  return 1
}

up() {
  if [ -n "${GPU:-}" ]; then
    export REGREEN_MODEL=${MODEL:?give MODEL=DIR, the folder of the model} COMPOSE_PROFILES=gpu
    export REGREEN_POLICY__ENGINE=sglang REGREEN_POLICY__MODEL=/model REGREEN_POLICY__SGLANG_URLS=http://sglang:30000
  fi
  if [ "${PORTS:-}" = any ]; then
    export REGREEN_{DATASET,SANDBOX,POLICY,JUDGE,LEARNER,PROMETHEUS}_PORT=0
  fi
  local images sglang
  sglang=$(compose config | sed -n 's/^ *image: *//p' | grep '^regreen-sglang' || true)
  if [ -n "${GPU:-}" ] && ! docker image inspect "$sglang" >/dev/null 2>&1; then
    echo "compose: there is no image $sglang; make images NAMES=sglang" >&2
    exit 3
  fi
  images=$(missing)
  [ -z "$images" ] || TAG=${REGREEN_TAG:-latest} infra/scripts/images.sh $images
  compose up --detach --no-build --remove-orphans
  mkdir -p "$shown"
  chmod 700 "$shown"
  compose exec -T access tar -C /home/regreen/data -ch certs/client client.token | tar -C "$shown" -x --no-same-owner
  local places=() name
  for name in dataset:50051 sandbox:50052 policy:50053 judge:50054 learner:50055; do
    places+=("${name%:*}=$(compose port "${name%:*}" "${name#*:}")")
  done
  elsewhere "${places[@]}" --by "Compose (make down-docker)" --tls "$shown/certs/client" --token-file "$shown/client.token"
  await_health
  .venv/bin/regreen up --home "$home"
}

case ${1:-} in
  up) up ;;
  down) shift; compose --profile gpu down "$@"; elsewhere --leave ;;
  *) compose "$@" ;;
esac
