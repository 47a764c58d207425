#!/usr/bin/env bash
# Makes the environment that run.sh uses, beside this file. Needs Python 3.11 or newer with venv, and a package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
"${PYTHON:-python3}" -m venv environment
environment/bin/python -m pip install --quiet --requirement requirements.txt
environment/bin/python run.py --check
