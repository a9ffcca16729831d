# The sandbox service with the embedded runtime: one container per node (`python -m sandbox_svc.worker`), or the workers of
# `--backend kubernetes` (docs/operations/kubernetes.md). Sandboxes see this image's system directories and Python read-only.
#
#   docker build -t regreen-sandbox -f infra/docker/sandbox.Dockerfile .
#
# Any image with apt and a Python of 3.11 or newer among its packages will do as a base; behind a mirror, add --build-arg PIP_INDEX_URL=...
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE} AS spawner
RUN apt-get update && apt-get install --yes --no-install-recommends python3 gcc libc6-dev
COPY regreen /src/regreen
COPY sandbox_svc /src/sandbox_svc
RUN cd /src && python3 -m sandbox_svc.backends.program

FROM ${BASE_IMAGE}
ARG PIP_INDEX_URL=

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

COPY requirements/sandbox.txt /opt/regreen/requirements.txt
RUN python3 -m venv /opt/regreen/venv \
    && PIP_NO_CACHE_DIR=1 /opt/regreen/venv/bin/pip install --quiet --require-hashes --requirement /opt/regreen/requirements.txt

# Without root there is one user inside every sandbox and one outside of all; the home is where states and sandboxes lie.
RUN useradd --create-home --uid 10001 regreen \
    && install -d -o regreen -g regreen /home/regreen/data /run/regreen
COPY regreen /opt/regreen/lib/regreen
COPY sandbox_svc /opt/regreen/lib/sandbox_svc
COPY --from=spawner /src/sandbox_svc/backends/spawner/built /opt/regreen/lib/sandbox_svc/backends/spawner/built

USER 10001:10001
ENV HOME=/home/regreen PATH=/opt/regreen/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/regreen/lib PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/regreen
EXPOSE 50052 9052
ENTRYPOINT []
CMD ["python3", "-m", "sandbox_svc", "--home", "/home/regreen/data"]
