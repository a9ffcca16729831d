# Rollout workers, drivers and all other commands of `regreen`. docs/operations/compose.md says how images are built.
ARG BASE_IMAGE=regreen-base
FROM ${BASE_IMAGE} AS packages
COPY infra/docker/packages.sh infra/docker/sbom.py regreen/__init__.py /tmp/
COPY build/wheelhouse /wheelhouse
RUN sh /tmp/packages.sh rollout

FROM ${BASE_IMAGE}
COPY --from=packages /opt/regreen /opt/regreen
COPY regreen /opt/regreen/lib/regreen
RUN python3 -m compileall -q /opt/regreen/lib

# Where `regreen.stack.access` puts what it makes for each service: volumes, which get the owner of these folders.
RUN install -d -o regreen -g regreen /handed/dataset /handed/sandbox /handed/policy /handed/judge /handed/learner /handed/database

USER 10001:10001
ENTRYPOINT []
CMD ["python3", "-m", "regreen.cli"]
