# One SGLang replica for `python -m policy_svc --engine sglang` (docs/services/policy.md). Needs an NVIDIA GPU.
# SGLang has an image of its own because its pins of torch and transformers fit no other environment (docs/decisions/0010).
#
#   make images NAMES=sglang
#   docker run --gpus all --shm-size 16g -p 30000:30000 -v "$MODEL":/model:ro -v "$HOME_OF_REGREEN":"$HOME_OF_REGREEN":ro regreen-sglang
#
# /model holds the weights of the folder that the policy's `model` names. The learner's home is mounted under its own path, since
# new versions are loaded by path; mounted elsewhere, tell the policy with `sglang_path_map`. What follows the image's name is
# added to the server's options.

# The release of the `sglang` extra in pyproject.toml; 0.5.16 is served too.
ARG BASE_IMAGE=lmsysorg/sglang:v0.5.23
FROM ${BASE_IMAGE}

# The base runs as root; the server needs only a user with a name and a home for the caches of compiled kernels.
COPY infra/docker/sbom.py /tmp/
RUN useradd --create-home --uid 10001 regreen && mkdir -p /opt/regreen \
  && python3 /tmp/sbom.py regreen-sglang >/opt/regreen/sbom.json && rm /tmp/sbom.py
USER regreen
ENV HOME=/home/regreen
WORKDIR /home/regreen

# Logprobs of the raw policy, before the temperature.
ENV SGLANG_RETURN_ORIGINAL_LOGPROB=1

EXPOSE 30000
# Deterministic inference honours sampling seeds, so that a rollout can be replayed.
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0", "--port", "30000", "--model-path", "/model", "--enable-deterministic-inference", "--enable-metrics"]
