# The learner service with torch, apart from SGLang, whose pins of torch and transformers fit no other environment. docs/operations/compose.md says how images are built.
ARG BASE_IMAGE=regreen-base
FROM ${BASE_IMAGE} AS packages
COPY infra/docker/packages.sh infra/docker/sbom.py regreen/__init__.py /tmp/
COPY build/wheelhouse /wheelhouse
RUN sh /tmp/packages.sh learner

FROM ${BASE_IMAGE}
COPY --from=packages /opt/regreen /opt/regreen
COPY regreen /opt/regreen/lib/regreen
COPY learner_svc /opt/regreen/lib/learner_svc
RUN python3 -m compileall -q /opt/regreen/lib

USER 10001:10001
EXPOSE 50055 9055
ENTRYPOINT []
CMD ["python3", "-m", "learner_svc"]
