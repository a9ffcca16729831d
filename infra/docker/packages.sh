#!/bin/sh
# Installs the packages of one service in its image, each by its hash and from the wheelhouse alone, and lists what the image holds.
set -eu
name=$1 venv=/opt/regreen/venv
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-deps --no-index --find-links /wheelhouse \
  --require-hashes --requirement "/wheelhouse/$name.txt"
"$venv/bin/python3" /tmp/sbom.py "regreen-$name" /tmp/__init__.py >/opt/regreen/sbom.json
