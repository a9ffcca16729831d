# The judge service. docs/operations/compose.md says how images are built.
ARG BASE_IMAGE=regreen-base
FROM ${BASE_IMAGE} AS packages
COPY infra/docker/packages.sh infra/docker/sbom.py regreen/__init__.py /tmp/
COPY build/wheelhouse /wheelhouse
RUN sh /tmp/packages.sh judge

FROM ${BASE_IMAGE}
COPY --from=packages /opt/regreen /opt/regreen
COPY regreen /opt/regreen/lib/regreen
COPY judge_svc /opt/regreen/lib/judge_svc
RUN python3 -m compileall -q /opt/regreen/lib

USER 10001:10001
EXPOSE 50054 9054
ENTRYPOINT []
CMD ["python3", "-m", "judge_svc"]
