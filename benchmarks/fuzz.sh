#!/usr/bin/env bash
# Requests made up by schemathesis from a running server's /openapi.json: no crash, no answer that the document does not know.
#   pip install schemathesis; bash benchmarks/fuzz.sh [PACKAGE]      PACKAGE: runs/demo/packages/onnx-int4
# Twice: as made up, and with real speech in every second valid upload (benchmarks/fuzz_hooks.py). A schema cannot say which bytes are: a refusal of what is formally valid is no fault (positive_data_acceptance).
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
PACKAGE=${1:-runs/demo/packages/onnx-int4}
OUT=${OUT:-runs/fuzz}
EXAMPLES=${EXAMPLES:-300}
mkdir -p "$OUT/tmp"
rm -f "$OUT"/tmp/* "$OUT/serve.log"

TMPDIR=$(realpath "$OUT/tmp") "$BIN/halve" serve --model "$PACKAGE" --port 0 > "$OUT/serve.log" 2>&1 &
SERVER=$!
trap 'kill "$SERVER" 2> /dev/null || true' EXIT
for _ in $(seq 150); do
    URL=$(grep -o -m1 'http://127\.0\.0\.1:[0-9]*' "$OUT/serve.log" 2> /dev/null || true)
    [ -n "$URL" ] && break
    sleep 0.2
done
[ -n "$URL" ] || { cat "$OUT/serve.log"; exit 1; }

FAULTS=0
fuzz() { # NAME [OPTION…]
    local NAME=$1
    shift
    "$BIN/schemathesis" --no-color run "$URL/openapi.json" --max-examples "$EXAMPLES" --seed 0 --continue-on-failure \
        --exclude-checks "positive_data_acceptance$*" --request-timeout 60 | tee "$OUT/$NAME.txt" || FAULTS=1
}
fuzz schemathesis
# schemathesis takes bytes in a form for no string, and their acceptance for a fault.
SCHEMATHESIS_HOOKS=benchmarks.fuzz_hooks PYTHONPATH=. fuzz speech ,negative_data_rejection
kill -0 "$SERVER" || { echo "The server is gone"; exit 1; }
"$BIN/python" - "$URL" << 'END' | tee "$OUT/after.txt"
import sys
import urllib.request


def read(path: str) -> str:
    return urllib.request.urlopen(sys.argv[1] + path).read().decode()


print("After it:", read("/health"))
print(*(line for line in read("/metrics").splitlines() if line.startswith("halve_requests_total")), sep="\n")
END
for ENDPOINT in /v1/audio/translations /v1/chat/completions; do
    grep -q "endpoint=\"$ENDPOINT\",status=\"200\"" "$OUT/after.txt" || { echo "Nothing was translated by $ENDPOINT"; FAULTS=1; }
done
kill -TERM "$SERVER"
STATUS=0
wait "$SERVER" || STATUS=$?
trap - EXIT
echo "The server ended with status $STATUS and left $(find "$OUT/tmp" -type f | wc -l) files; tracebacks in its log: $(grep -c Traceback "$OUT/serve.log" || true)."
[ $FAULTS -eq 0 ] && [ $STATUS -eq 0 ] && [ -z "$(find "$OUT/tmp" -type f)" ] && ! grep -q Traceback "$OUT/serve.log"
