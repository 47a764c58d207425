#!/usr/bin/env bash
# The students of the evidence, for both languages at once, from the committed teacher; results in runs/students.
#   bash benchmarks/students.sh [STEP…]      all steps without any; each keeps what it has finished
# Steps: corpus unheard plans translations searched untranslated A A_fine A_mean A_lessons A_searched A_unheard B B_long B_long_mean B_mean B_twice B_twice_fine B_searched B_unheard C C_staged D D_staged baselines select test table
# BEAMS=5 measures with five beams, BATCH_TEST rows at once; EARLIER=benchmarks/results/2026-11-26-beams (-de and -zh) has the teacher's translations. GROUPS_OF_STUDENTS=half measures C, D and the unpruned teacher in 4 bits, pruned C and D alone, staged C_staged and D_staged, qlora A and B, quarter B alone, seeds A of three seeds, fine A_fine of SEED and B_twice, searched A_searched and B_searched, unheard A_unheard of SEED_A and B_unheard, mean A_mean, lessons A_lessons, long B_long_mean, head4 B_twice_fine, equal the unpruned teacher at the bytes of A_fine: a student in one group only.
# On slow processors: DTYPE=float32 where bfloat16 is emulated, LIMIT (segments the teacher translates), STEPS_A, STEPS_B, STEPS_AGAIN, STEPS_C, BATCH_QLORA, RATE_QLORA, BATCH_DISTILL (32: batches of 128 take half as long again).
# Everything is chosen on `select`; `test` is translated by the step `test` alone, once a student.
#   A  no layer pruned, QLoRA + distillation, ONNX in 4 bits
#   B  a quarter of the layers pruned, QLoRA + distillation, ONNX in 4 bits
#   B_twice  B, merged, and tuned as long again
#   B_twice_fine  B_twice in blocks of 16, its head in 4 bits like the layers: what its bar leaves room for; named B-twice-head4
#   B_long  B for STEPS_LONG of 96 rows; B_long_mean  the mean of the adapters of its seeds 0, 1 and 2, stored as B_twice_fine is
#   B_searched  B, merged, and tuned as long again on the best of the teacher's five beams
#   A_searched  A, merged, and tuned for STEPS_AGAIN on the best of five beams; stored as A_fine
#   A_unheard, B_unheard  the same on the teacher's translations of speech that it was not trained on (untranslated, from the GIMP help)
#   A_fine   A in finer blocks, for which its bar leaves room
#   A_lessons  the mean of two adapters: A of fewer steps, and one that learnt the references of all clips with smoothed labels; stored as A_fine
#   A_mean, B_mean  the mean of the adapters of seeds 0, 1 and 2, which A or B has made before; A_mean is stored as A_fine
#   C  half of the layers pruned, trained in full with distillation, bf16
#   D  C as ONNX in 4 bits
#   C_staged  B_long_mean without three more layers, trained in full as C, then on the references alone with smoothed labels; the mean of both states
#   D_staged  C_staged as ONNX in 4 bits
set -euo pipefail
cd "$(dirname "$0")/.."
HALVE=${HALVE:-.venv/bin/halve}
PYTHON=${HALVE%halve}python
TEACHER=${TEACHER:-demo/teacher}
CORPUS=${CORPUS:-runs/demo-corpus}
UNHEARD=${UNHEARD:-runs/unheard}
OUT=${OUT:-runs/students}
QUARTER=${QUARTER:-3}
HALF=${HALF:-6}
SEED=${SEED:-0}
STEPS_A=${STEPS_A:-3000}
STEPS_B=${STEPS_B:-3000}
STEPS_C=${STEPS_C:-3000}
STEPS_AGAIN=${STEPS_AGAIN:-1000}
STEPS_LONG=${STEPS_LONG:-2400}
LANGS=(--lang de --lang zh)
TUNE=(--corpus "$CORPUS" "${LANGS[@]}" --states-dir "$OUT/states" --epochs 100 --schedule linear
    --warmup 0.03 --spec-mask 0.08 --checkpoint-every 50 --eval-every 300 --select-segments 120 --patience 100)
LESSON=(--translations "$OUT/translations" --logit-weight 0.5)
QLORA=(--method qlora --rank 64 --alpha 128 --learning-rate "${RATE_QLORA:-3e-4}" --batch-size "${BATCH_QLORA:-48}")
# What A's and B's bars leave room for: the tower and the head in 8 bits; every decoder layer in 4.
ROOM=(--encoder-bits 8 --head-bits 8)
FULL=(--method full --learning-rate 5e-4 --weight-decay 0.01 --batch-size 48)

missing() { [ ! -f "$1/artefact.json" ]; }
package() { # MODEL NAME OPTIONS…
    missing "$OUT/packages/$2" || return 0
    "$HALVE" package --model "$1" --corpus "$CORPUS" "${LANGS[@]}" --target onnx --precision int4 --block-size 32 --max-drop 5 --out "$OUT/packages/$2" "${@:3}"
}
tune() { # MODEL NAME STEPS OPTIONS…
    missing "$OUT/tuned/$2-$SEED" || return 0
    "$HALVE" tune --model "$1" --out "$OUT/tuned/$2-$SEED" --seed "$SEED" "${TUNE[@]}" "${LESSON[@]}" --max-steps "$3" "${@:4}"
}
merge() { # MODEL NAME
    missing "$OUT/merged/$2-$SEED" || return 0
    "$HALVE" merge --model "$1" --adapter "$OUT/tuned/$2-$SEED" --onto auto --requantized --corpus "$CORPUS" --out "$OUT/merged/$2-$SEED"
}

corpus() { missing "$CORPUS" || return 0; "$PYTHON" -m demo.build_corpus --out "$CORPUS"; }
plans() {
    for CODE in de zh; do
        missing "$OUT/importance-$CODE" || continue
        "$HALVE" importance --model "$TEACHER" --corpus "$CORPUS" --lang "$CODE" --remove "$HALF" --out "$OUT/importance-$CODE"
    done
    "$PYTHON" -m benchmarks.students plan "$OUT" --quarter "$QUARTER" --half "$HALF"
    for SIZE in quarter half; do
        missing "$OUT/pruned-$SIZE" || continue
        "$HALVE" prune --model "$TEACHER" --layers "$(cat "$OUT/layers-$SIZE.txt")" --verify full --out "$OUT/pruned-$SIZE"
    done
}
unheard() { missing "$UNHEARD" || return 0; "$PYTHON" -m demo.unheard --corpus "$CORPUS" --out "$UNHEARD"; }
distilled() { # CORPUS NAME OPTIONS…
    missing "$OUT/$2" || return 0
    "$HALVE" distill --model "$TEACHER" --corpus "$1" "${LANGS[@]}" --dtype "${DTYPE:-bfloat16}" --logits 8 \
        ${LIMIT:+--limit "$LIMIT"} --states-dir "$OUT/states" --out "$OUT/$2" "${@:3}"
}
translations() { distilled "$CORPUS" translations --batch-size "${BATCH_DISTILL:-128}"; }
searched() { distilled "$CORPUS" translations-beam5 --batch-size 160 --beams 5; }
untranslated() { distilled "$UNHEARD" translations-unheard --batch-size 128 --untranslated; }
A() { tune "$TEACHER" A "$STEPS_A" "${QLORA[@]}"; merge "$TEACHER" A; package "$OUT/merged/A-$SEED" "A-$SEED" "${ROOM[@]}"; }
B() { tune "$OUT/pruned-quarter" B "$STEPS_B" "${QLORA[@]}"; merge "$OUT/pruned-quarter" B; package "$OUT/merged/B-$SEED" "B-$SEED" "${ROOM[@]}"; }
again() { # BASE NAME STEPS OPTIONS…: a merged student is tuned once more, with other batches
    tune "$1" "$2" "$3" "${QLORA[@]}" --learning-rate 2e-4 --seed "$((SEED + 100))" --eval-every 600 "${@:4}"
    merge "$1" "$2"
}
B_searched() {
    again "$OUT/merged/B-$SEED" B-searched "$STEPS_B" --translations "$OUT/translations-beam5"
    package "$OUT/merged/B-searched-$SEED" "B-searched-$SEED" "${ROOM[@]}"
}
A_searched() {
    again "$OUT/merged/A-$SEED" A-searched "$STEPS_AGAIN" --translations "$OUT/translations-beam5"
    package "$OUT/merged/A-searched-$SEED" "A-searched-$SEED" "${ROOM[@]}" --block-size 16
}
on_unheard() { # BASE NAME STEPS
    again "$1" "$2" "$3" --corpus "$UNHEARD" --translations "$OUT/translations-unheard"
}
B_unheard() {
    on_unheard "$OUT/merged/B-$SEED" B-unheard "$STEPS_B"
    package "$OUT/merged/B-unheard-$SEED" "B-unheard-$SEED" "${ROOM[@]}"
}
A_unheard() {
    on_unheard "$OUT/merged/A-$SEED" A-unheard "$STEPS_AGAIN"
    package "$OUT/merged/A-unheard-$SEED" "A-unheard-$SEED" "${ROOM[@]}" --block-size 16
}
mean() { # MODEL NAME
    missing "$OUT/merged/$2-mean" || return 0
    "$HALVE" merge --model "$1" --adapter "$OUT/tuned/$2-0" "$OUT/tuned/$2-1" "$OUT/tuned/$2-2" --onto auto --requantized \
        --corpus "$CORPUS" --out "$OUT/merged/$2-mean"
}
A_mean() { mean "$TEACHER" A; package "$OUT/merged/A-mean" A-mean-fine "${ROOM[@]}" --block-size 16; }
A_lessons() {
    local FIRST=$OUT/tuned/A-short-$SEED SECOND=$OUT/tuned/A-smooth-$SEED
    tune "$TEACHER" A-short 800 "${QLORA[@]}" --eval-every 800
    if missing "$SECOND"; then
        "$HALVE" tune --model "$TEACHER" --out "$SECOND" --seed "$SEED" "${TUNE[@]}" --eval-every 520 --max-steps 520 "${QLORA[@]}" --label-smoothing 0.1
    fi
    if missing "$OUT/merged/A-lessons"; then
        "$HALVE" merge --model "$TEACHER" --adapter "$FIRST" "$SECOND" --onto auto --requantized --corpus "$CORPUS" --out "$OUT/merged/A-lessons"
    fi
    package "$OUT/merged/A-lessons" A-lessons "${ROOM[@]}" --block-size 16
}
B_mean() { mean "$OUT/pruned-quarter" B; package "$OUT/merged/B-mean" B-mean "${ROOM[@]}"; }
A_fine() { package "$OUT/merged/A-$SEED" "A-fine-$SEED" "${ROOM[@]}" --block-size 16; }
B_long() { tune "$OUT/pruned-quarter" B-long "$STEPS_LONG" "${QLORA[@]}" --batch-size 96 --eval-every "$STEPS_LONG"; }
B_long_mean() { mean "$OUT/pruned-quarter" B-long; package "$OUT/merged/B-long-mean" B-long-mean-head4 --encoder-bits 8 --block-size 16; }
B_twice() {
    again "$OUT/merged/B-$SEED" B-twice "$STEPS_B"
    package "$OUT/merged/B-twice-$SEED" "B-twice-$SEED" "${ROOM[@]}"
}
B_twice_fine() {
    package "$OUT/merged/B-twice-$SEED" "B-twice-head4-$SEED" --encoder-bits 8 --block-size 16
}
C() { tune "$OUT/pruned-half" C "$STEPS_C" "${FULL[@]}"; }
C_staged() {
    local FIRST=$OUT/tuned/C-staged-$SEED SECOND=$OUT/tuned/C-smooth-$SEED
    if missing "$OUT/pruned-staged"; then
        "$HALVE" prune --model "$OUT/merged/B-long-mean" --layers 3,4,7 --verify full --out "$OUT/pruned-staged"
    fi
    tune "$OUT/pruned-staged" C-staged 1200 "${FULL[@]}" --learning-rate 3e-4
    if missing "$SECOND"; then
        "$HALVE" tune --model "$FIRST" --out "$SECOND" --seed "$SEED" "${TUNE[@]}" --eval-every 450 --max-steps 1800 "${FULL[@]}" --learning-rate 3e-4 --label-smoothing 0.1
    fi
    missing "$OUT/merged/C-mean" || return 0
    "$HALVE" merge --model "$FIRST" --adapter "$FIRST" "$SECOND" --out "$OUT/merged/C-mean"
}
D_staged() { package "$OUT/merged/C-mean" D-mean --head-bits 8; }
D() { package "$OUT/tuned/C-$SEED" "D-$SEED" --head-bits 8; }
baselines() {
    package "$TEACHER" teacher-int4
    package "$TEACHER" teacher-int4-A "${ROOM[@]}"
    package "$TEACHER" teacher-int4-fine "${ROOM[@]}" --block-size 16
}
quality() { # SPLIT GROUP STUDENTS…
    for CODE in de zh; do
        local PLACE=$OUT/$1-$CODE-$2${BEAMS:+-beams$BEAMS}
        missing "$PLACE" || continue
        "$HALVE" bench quality --teacher "$TEACHER" --corpus "$CORPUS" --lang "$CODE" --split "$1" --no-controls --out "$PLACE" ${BEAMS:+--beams "$BEAMS"} \
            --batch-size "${BATCH_TEST:-16}" ${EARLIER:+--earlier "$EARLIER-$CODE"} --students "${@:3}"
    done
}
both() { # SPLIT: in two groups, so that the one can be measured before the other is trained
    for GROUP in ${GROUPS_OF_STUDENTS:-half qlora}; do
        case "$GROUP" in
            half) quality "$1" half "$OUT/packages/teacher-int4" "$OUT/tuned/C-$SEED" "$OUT/packages/D-$SEED" ;;
            pruned) quality "$1" pruned "$OUT/tuned/C-$SEED" "$OUT/packages/D-$SEED" ;;
            staged) quality "$1" staged "$OUT/merged/C-mean" "$OUT/packages/D-mean" ;;
            quarter) quality "$1" quarter "$OUT/packages/teacher-int4-A" "$OUT/packages/B-$SEED" ;;
            seeds) quality "$1" seeds "$OUT/packages/A-0" "$OUT/packages/A-1" "$OUT/packages/A-2" ;;
            fine) quality "$1" fine "$OUT/packages/A-fine-$SEED" "$OUT/packages/B-twice-0" ;;
            unheard) quality "$1" unheard "$OUT/packages/A-unheard-${SEED_A:-$SEED}" "$OUT/packages/B-unheard-$SEED" ;;
            long) quality "$1" long "$OUT/packages/B-long-mean-head4" ;;
            lessons) quality "$1" lessons "$OUT/packages/A-lessons" ;;
            mean) quality "$1" mean "$OUT/packages/A-mean-fine" ;;
            head4) quality "$1" head4 "$OUT/packages/B-twice-head4-$SEED" ;;
            equal) quality "$1" equal "$OUT/packages/teacher-int4-fine" ;;
            searched) quality "$1" searched "$OUT/packages/A-searched-${SEED_A:-$SEED}" "$OUT/packages/B-searched-$SEED" ;;
            qlora) quality "$1" qlora "$OUT/packages/teacher-int4-A" "$OUT/packages/A-$SEED" "$OUT/packages/B-$SEED" ;;
        esac
    done
}
select_() { both select; }
test_() { both test; }
table() { "$PYTHON" -m benchmarks.students table "$OUT"; }

for STEP in "${@:-corpus plans translations A B C D baselines select test table}"; do
    for ONE in $STEP; do
        case "$ONE" in select | test) "${ONE}_" ;; *) "$ONE" ;; esac
    done
done
