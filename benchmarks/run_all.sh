#!/usr/bin/env bash
# Makes the figures of README's demo again, and most results behind the documents; results in runs/. The students: benchmarks/students.sh. README's tables of committed results: python -m benchmarks.readme --write.
#   make bench                                        all of it, about three hours on 2 quiet cores
#   bash benchmarks/run_all.sh .venv/bin demo serve   parts of it
# Parts: demo (10 min), teacher (2), importance (50), order (60), scaling (10), serve (6), soak (6), packages (20).
# Peers of the latency bench need environments of their own: benchmarks/peer_environments.sh, latency_peers.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${1:-.venv/bin}
shift || true
MODEL=(--model demo/teacher --corpus demo/corpus)
STUDENT=runs/demo/student
PACKAGE=runs/demo/packages/onnx-int4

demo() {
    "$BIN/halve" run demo/recipe.yaml --out runs/demo
    "$BIN/python" demo/show_report.py runs/demo/report
}
teacher() {
    "$BIN/halve" bench quality --teacher demo/teacher --corpus demo/corpus --lang zh --out runs/teacher-quality-zh
}
importance() {
    for LANG_CODE in de zh; do
        "$BIN/halve" bench importance "${MODEL[@]}" --lang $LANG_CODE --also bounded,racing --out runs/importance-$LANG_CODE
    done
}
order() {
    for LANG_CODE in de zh; do
        "$BIN/python" -m benchmarks.importance_order "${MODEL[@]}" --lang $LANG_CODE --remove 6 --segments 40 --out runs/order-$LANG_CODE
    done
}
scaling() { "$BIN/python" -m benchmarks.scaling --out runs/scaling; }
serve() { "$BIN/halve" bench serve --model $PACKAGE --teacher demo/teacher --corpus demo/corpus --lang de --out runs/serve; }
soak() { "$BIN/python" -m benchmarks.soak --model $PACKAGE --corpus demo/corpus --lang de --serve=--reserve --out runs/soak; }
packages() {
    "$BIN/python" -m benchmarks.faithfulness demo/teacher $STUDENT --corpus demo/corpus --lang de --lang zh --out runs/faithfulness
    "$BIN/python" -m benchmarks.quantisation $STUDENT --corpus demo/corpus --lang de --out runs/quantisation
}

for PART in "${@:-demo teacher importance order scaling serve soak packages}"; do
    for ONE in $PART; do "$ONE"; done
done
