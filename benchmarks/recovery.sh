#!/usr/bin/env bash
# Ways to recover a pruned student's quality, compared on `select` at the same number of steps.
#   bash benchmarks/recovery.sh [SEED…]      seeds 0 to 2 without any; finished parts are kept
# CORPUS, TRAIN (segments) and STEPS change the budget: demo/corpus carries 300 training segments.
set -euo pipefail
cd "$(dirname "$0")/.."
HALVE=${HALVE:-.venv/bin/halve}
CORPUS=${CORPUS:-demo/corpus}
TRAIN=${TRAIN:-300}
STEPS=${STEPS:-150}
OUT=${OUT:-runs/recovery}
# The first three that the search removes for German: benchmarks/results/2026-11-24-importance-de
LAYERS=${LAYERS:-8,1,10}
COMMON=(--corpus "$CORPUS" --lang de --train-segments "$TRAIN" --max-steps "$STEPS" --epochs 100 --batch-size 8
    --checkpoint-every 25 --eval-every "$((STEPS / 3))")
QLORA=(--method qlora --rank 64 --alpha 128 --learning-rate 3e-4)

tune() { # NAME SEED OPTIONS…
    "$HALVE" tune --model "$OUT/pruned" --out "$OUT/tuned/$1-$2" --seed "$2" "${COMMON[@]}" "${@:3}"
}

"$HALVE" prune --model demo/teacher --layers "$LAYERS" --out "$OUT/pruned"
"$HALVE" distill --model demo/teacher --corpus "$CORPUS" --lang de --limit "$TRAIN" --logits 8 --out "$OUT/translations"
ROWS=(--translations "$OUT/translations")
for SEED in "${@:-0 1 2}"; do
    for ONE in $SEED; do
        tune references "$ONE" "${QLORA[@]}"
        tune translations "$ONE" "${QLORA[@]}" "${ROWS[@]}"
        tune forward-0.5 "$ONE" "${QLORA[@]}" "${ROWS[@]}" --logit-weight 0.5
        tune forward-1.0 "$ONE" "${QLORA[@]}" "${ROWS[@]}" --logit-weight 1.0
        tune reverse-0.5 "$ONE" "${QLORA[@]}" "${ROWS[@]}" --logit-weight 0.5 --divergence reverse
        tune full "$ONE" --method full --learning-rate 1e-4 "${ROWS[@]}"
        tune full-forward-0.5 "$ONE" --method full --learning-rate 1e-4 "${ROWS[@]}" --logit-weight 0.5
    done
done
"${HALVE%halve}python" -m benchmarks.recovery "$OUT"
