# The policy service with an engine of its own, or in front of SGLang (sglang.Dockerfile). docs/operations/compose.md says how images are built.
ARG BASE_IMAGE=regreen-base
FROM ${BASE_IMAGE} AS packages
COPY infra/docker/packages.sh infra/docker/sbom.py regreen/__init__.py /tmp/
COPY build/wheelhouse /wheelhouse
RUN sh /tmp/packages.sh policy

FROM ${BASE_IMAGE}
COPY --from=packages /opt/regreen /opt/regreen
COPY regreen /opt/regreen/lib/regreen
COPY policy_svc /opt/regreen/lib/policy_svc
RUN python3 -m compileall -q /opt/regreen/lib

USER 10001:10001
EXPOSE 50053 9053 50063
ENTRYPOINT []
CMD ["python3", "-m", "policy_svc"]
