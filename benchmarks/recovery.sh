#!/usr/bin/env bash
# Ways to choose the layers that go, and ways to recover what their loss costs, compared on `select` at the same
# number of steps, for German and Chinese in one student.
#   bash benchmarks/recovery.sh [SEED…]      seeds 0 to 2 without any; finished parts are kept
# Plans, translations and encoded audio are those of students.sh, which makes what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
HALVE=${HALVE:-.venv/bin/halve}
PYTHON=${HALVE%halve}python
export TEACHER=${TEACHER:-demo/teacher}
export CORPUS=${CORPUS:-runs/demo-corpus}
STUDENTS=${STUDENTS:-runs/students}
STEPS=${STEPS:-300}
OUT=${OUT:-runs/recovery}
# To run some of them: WAYS="teacher random" bash benchmarks/recovery.sh
WAYS=${WAYS:-references translations forward-0.5 forward-1.0 reverse-0.5 slow qlora qlora-forward-0.5 healed strict unfiltered hypotheses random middle block-influence teacher}
# The layers' choices, 96,000 rows of QLoRA: TRAIN=qlora BATCH=96 STEPS=1000 WAYS="search no-distillation random middle block-influence teacher" OUT=runs/recovery-budget
COMMON=(--corpus "$CORPUS" --lang de --lang zh --states-dir "$STUDENTS/states" --max-steps "$STEPS" --epochs 100
    --batch-size "${BATCH:-48}" --schedule linear --warmup 0.03 --spec-mask 0.08 --checkpoint-every 50 --eval-every "${EVERY:-$((STEPS / 3))}")
FULL=(--method full --learning-rate 5e-4 --weight-decay 0.01)
QLORA=(--method qlora --rank 64 --alpha 128 --learning-rate 3e-4)
ROWS=(--translations "$STUDENTS/translations")
# How the layers' choices are compared (search, no-distillation, random, middle, block-influence, teacher).
case ${TRAIN:-full} in full) TRAINED=("${FULL[@]}") ;; qlora) TRAINED=("${QLORA[@]}") ;; *) echo "TRAIN is full or qlora" >&2; exit 2 ;; esac
BEST=("${TRAINED[@]}" "${ROWS[@]}" --logit-weight 0.5)
SOFT=("${FULL[@]}" "${ROWS[@]}" --logit-weight 0.5)

missing() { [ ! -f "$1/artefact.json" ]; }
tune() { # NAME SEED MODEL OPTIONS…
    missing "$OUT/tuned/$1-$2" || return 0
    "$HALVE" tune --model "$3" --out "$OUT/tuned/$1-$2" --seed "$2" "${COMMON[@]}" "${@:4}"
}
pruned() { # NAME LAYERS [MODEL]: the model without them
    missing "$OUT/pruned/$1" || return 0
    "$HALVE" prune --model "${3:-$TEACHER}" --layers "$2" --out "$OUT/pruned/$1"
}
chosen() { # NAME METHOD SEED: layers as a criterion chooses them, as many as the search's
    if missing "$OUT/plans/$1"; then
        "$HALVE" importance --model "$TEACHER" --corpus "$CORPUS" --lang de --method "$2" --seed "$3" --remove "$COUNT" --out "$OUT/plans/$1" >&2
    fi
    "$PYTHON" -c "import json, sys; print(*json.load(open(sys.argv[1]))['removed'], sep=',')" "$OUT/plans/$1/plan.json"
}
taught() { # NAME SEED OPTIONS…: by translations that were kept otherwise
    if missing "$OUT/translations/$1"; then
        "$HALVE" distill --model "$TEACHER" --corpus "$CORPUS" --lang de --lang zh --dtype "${DTYPE:-bfloat16}" --logits 8 --batch-size 128 \
            ${LIMIT:+--limit "$LIMIT"} --states-dir "$STUDENTS/states" --out "$OUT/translations/$1" "${@:3}"
    fi
    tune "$1" "$2" "$SEARCH" "${FULL[@]}" --translations "$OUT/translations/$1" --logit-weight 0.5
}
healed() { # SEED: a layer goes, a share of the steps, the next one goes
    local MODEL=$TEACHER GONE=() LAYER NUMBER EACH
    for LAYER in ${LAYERS//,/ }; do
        NUMBER=$LAYER
        for EACH in "${GONE[@]}"; do if [ "$EACH" -lt "$LAYER" ]; then NUMBER=$((NUMBER - 1)); fi; done
        GONE+=("$LAYER")
        pruned "healed-$1-${#GONE[@]}" "$NUMBER" "$MODEL"
        if [ "${#GONE[@]}" -lt "$COUNT" ]; then
            MODEL=$OUT/healing/$1-${#GONE[@]}
            missing "$MODEL" || continue
            "$HALVE" tune --model "$OUT/pruned/healed-$1-${#GONE[@]}" --out "$MODEL" --seed "$1" "${COMMON[@]}" "${SOFT[@]}" \
                --max-steps "$((STEPS / COUNT))" --select-segments 0
        else
            tune healed "$1" "$OUT/pruned/healed-$1-$COUNT" "${SOFT[@]}" --max-steps "$((STEPS / COUNT))"
        fi
    done
}

OUT=$STUDENTS bash benchmarks/students.sh corpus plans translations
LAYERS=$(cat "$STUDENTS/layers-quarter.txt")
COUNT=$(echo "$LAYERS" | tr , '\n' | wc -l)
SEARCH=$STUDENTS/pruned-quarter
for SEED in "${@:-0 1 2}"; do
    for ONE in $SEED; do
        for WAY in $WAYS; do
            case $WAY in
                references) tune references "$ONE" "$SEARCH" "${FULL[@]}" ;;
                translations) tune translations "$ONE" "$SEARCH" "${FULL[@]}" "${ROWS[@]}" ;;
                forward-0.5) tune forward-0.5 "$ONE" "$SEARCH" "${SOFT[@]}" ;;
                forward-1.0) tune forward-1.0 "$ONE" "$SEARCH" "${FULL[@]}" "${ROWS[@]}" --logit-weight 1.0 ;;
                reverse-0.5) tune reverse-0.5 "$ONE" "$SEARCH" "${SOFT[@]}" --divergence reverse ;;
                slow) tune slow "$ONE" "$SEARCH" "${SOFT[@]}" --learning-rate 1e-4 ;;
                qlora) tune qlora "$ONE" "$SEARCH" "${QLORA[@]}" "${ROWS[@]}" ;;
                qlora-forward-0.5) tune qlora-forward-0.5 "$ONE" "$SEARCH" "${QLORA[@]}" "${ROWS[@]}" --logit-weight 0.5 ;;
                healed) healed "$ONE" ;;
                strict) taught strict "$ONE" --min-score 30 ;;
                unfiltered) taught unfiltered "$ONE" --min-score 0 --max-length-ratio 50 ;;
                hypotheses) taught hypotheses "$ONE" --hypotheses 3 --beams 4 ;;
                search) tune search "$ONE" "$SEARCH" "${BEST[@]}" ;;
                no-distillation) tune no-distillation "$ONE" "$SEARCH" "${TRAINED[@]}" ;;
                random)
                    pruned "random-$ONE" "$(chosen "random-$ONE" random "$ONE")"
                    tune random "$ONE" "$OUT/pruned/random-$ONE" "${BEST[@]}"
                    ;;
                middle | block-influence)
                    pruned "$WAY" "$(chosen "$WAY" "$WAY" 0)"
                    tune "$WAY" "$ONE" "$OUT/pruned/$WAY" "${BEST[@]}"
                    ;;
                teacher) tune teacher "$ONE" "$TEACHER" "${BEST[@]}" ;;
                *)
                    echo "unknown way $WAY" >&2
                    exit 2
                    ;;
            esac
        done
    done
done
"$PYTHON" -m benchmarks.recovery "$OUT"
