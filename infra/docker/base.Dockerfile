# What the images of all services stand on: Python 3.11, and the user that they run as. infra/scripts/images.sh builds it first.
#
# Any image with apt and a Python 3.11 among its packages will do as a base, such as one made with debootstrap.
# Authorities in its /usr/local/share/ca-certificates (*.crt) are trusted: those of a private package index, of a proxy.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates \
    && update-ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# Folders that volumes are mounted on: an engine gives a new volume the owner of the folder that it covers.
RUN useradd --create-home --uid 10001 regreen \
    && install -d -o regreen -g regreen /home/regreen/data /run/regreen /shared /blobs
ENV HOME=/home/regreen PATH=/opt/regreen/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/regreen/lib PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/regreen
