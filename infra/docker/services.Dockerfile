# Dataset, judge, policy, rollout workers, drivers and migrations; with torch, the learner (infra/helm/regreen runs them).
# It holds exactly what `make setup` installs, so that what runs is what was tested.
#
#   docker build -t regreen-services -f infra/docker/services.Dockerfile .
#   docker build -t regreen-learner --build-arg TORCH=2.13.0 -f infra/docker/services.Dockerfile .
#   docker run regreen-services python3 -m judge_svc
#
# Any image with apt and a Python 3.11 among its packages will do as a base; behind a mirror, add --build-arg PIP_INDEX_URL=...
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
ARG PIP_INDEX_URL=
ARG TORCH=

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# Every package by its hash; torch by its version alone, because each index has its own build of it. The package that would
# report the use of OpenVINO is in none of the lists (docs/services/policy.md).
COPY requirements /opt/regreen/requirements
RUN cd /opt/regreen/requirements && python3 -m venv /opt/regreen/venv \
    && awk 'index($0, "uv==") == 1 { on = 1 } on { print; if (!/\\$/) exit }' lock.txt >/tmp/uv.txt \
    && PIP_NO_CACHE_DIR=1 /opt/regreen/venv/bin/pip install --quiet --require-hashes --requirement /tmp/uv.txt \
    && /opt/regreen/venv/bin/uv pip install --quiet --no-cache --no-deps --require-hashes ${PIP_INDEX_URL:+--default-index "$PIP_INDEX_URL"} \
       --python /opt/regreen/venv/bin/python --build-constraint lock.txt -r lock.txt -r model.txt \
    && if [ -n "$TORCH" ]; then PIP_NO_CACHE_DIR=1 /opt/regreen/venv/bin/pip install --quiet "torch==$TORCH"; fi \
    && rm /tmp/uv.txt

RUN useradd --create-home --uid 10001 regreen && install -d -o regreen -g regreen /home/regreen/data
COPY regreen /opt/regreen/lib/regreen
COPY dataset_svc /opt/regreen/lib/dataset_svc
COPY judge_svc /opt/regreen/lib/judge_svc
COPY learner_svc /opt/regreen/lib/learner_svc
COPY policy_svc /opt/regreen/lib/policy_svc

USER 10001:10001
ENV HOME=/home/regreen PATH=/opt/regreen/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/regreen/lib PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/regreen
ENTRYPOINT []
CMD ["python3", "-m", "regreen.cli"]
