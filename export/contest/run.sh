#!/usr/bin/env bash
# Translates a text file line by line:
#   run.sh --lang-pair en-de --batch-size 16 --input FILE --output FILE
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "$here/environment/bin/python" "$here/run.py" "$@"
