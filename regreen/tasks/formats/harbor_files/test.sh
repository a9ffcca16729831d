#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
exec "${REGREEN_WORK:-/work}/env/bin/python" "$here/verify.py"
