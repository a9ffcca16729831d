# The sandbox service with the embedded runtime: one container per node (`python -m sandbox_svc.worker`), one of Compose, or the
# front and the workers of `--backend kubernetes` (docs/operations/kubernetes.md). Sandboxes see this image's system directories
# and Python read-only. docs/operations/compose.md says how images are built.
ARG BASE_IMAGE=regreen-base
FROM ${BASE_IMAGE} AS packages
COPY infra/docker/packages.sh infra/docker/sbom.py regreen/__init__.py /tmp/
COPY build/wheelhouse /wheelhouse
RUN sh /tmp/packages.sh sandbox

FROM ${BASE_IMAGE} AS spawner
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
COPY regreen /src/regreen
COPY sandbox_svc /src/sandbox_svc
RUN cd /src && PYTHONPATH=/src python3 -m sandbox_svc.backends.program

FROM ${BASE_IMAGE}
COPY --from=packages /opt/regreen /opt/regreen
COPY regreen /opt/regreen/lib/regreen
COPY sandbox_svc /opt/regreen/lib/sandbox_svc
COPY --from=spawner /src/sandbox_svc/backends/spawner/built /opt/regreen/lib/sandbox_svc/backends/spawner/built
RUN python3 -m compileall -q /opt/regreen/lib

# Without root there is one user inside every sandbox and one outside of all; the home is where states and sandboxes lie.
USER 10001:10001
EXPOSE 50052 9052
ENTRYPOINT []
CMD ["python3", "-m", "sandbox_svc", "--home", "/home/regreen/data"]
