#!/usr/bin/env bash
# Makes README's figures again: the demo for German, the teacher's scores and controls for Chinese.
#   make bench        (about 10 minutes on 2 cores; results in runs/)
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${1:-.venv/bin}

"$BIN/halve" run demo/recipe.yaml --out runs/demo
"$BIN/halve" bench quality --teacher demo/teacher --corpus demo/corpus --lang zh --out runs/teacher-quality-zh
"$BIN/python" demo/show_report.py runs/demo/report
