#!/usr/bin/env bash
# make demo: the recipe from end to end, then a server that translates one real recording.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${1:-.venv/bin}
OUT=${HALVE_DEMO_OUT:-runs/demo}
started=$(date +%s)

"$BIN/halve" run demo/recipe.yaml --out "$OUT"

PACKAGE="$OUT/packages/onnx-int4"
LOG="$OUT/serve.log"
"$BIN/halve" serve --model "$PACKAGE" --port 0 >"$LOG" 2>&1 &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null || true' EXIT
URL=""
for _ in $(seq 100); do
    URL=$(grep -o -m1 'http://127\.0\.0\.1:[0-9]*' "$LOG" || true)
    [ -n "$URL" ] && break
    kill -0 "$SERVER" 2>/dev/null || { cat "$LOG"; exit 1; }
    sleep 0.2
done
[ -n "$URL" ] || { echo "The server did not start:"; cat "$LOG"; exit 1; }

"$BIN/python" demo/ask_server.py "$URL" demo/corpus
kill -TERM "$SERVER"
wait "$SERVER" || true
trap - EXIT

echo
"$BIN/python" demo/show_report.py "$OUT/report"
echo "Took $(($(date +%s) - started)) s. Report: $OUT/report/report.html"
