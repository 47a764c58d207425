#!/usr/bin/env bash
# How demo/teacher was made, from packages to weights: about three hours on two free cores. It is not part of `make demo`.
#   bash demo/teach.sh [FOLDER]
# Both schedules count steps, those that the committed weights had; a short try: TRAIN=200 WARM_UP_STEPS=3 TEACH_STEPS=4
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
OUT=${1:-runs/teacher}
TRAIN=${TRAIN:-15751}
WARM_UP_STEPS=${WARM_UP_STEPS:-1686}
TEACH_STEPS=${TEACH_STEPS:-2591}
mkdir -p "$OUT"

# Text to speak, more text that is only read, then speech: all of select and test, and train.
"$BIN/python" -m demo.build_corpus --text-only "$OUT/text.jsonl"
"$BIN/python" -m demo.more_text --text "$OUT/text.jsonl" --out "$OUT/more.jsonl"
[ -d "$OUT/corpus" ] || "$BIN/python" -m demo.build_corpus --out "$OUT/corpus" --limit-train "$TRAIN"

# Whisper tiny.en's encoder, a tokenizer, and a decoder that has learnt to translate text for an hour.
[ -f "$OUT/base/config.json" ] || OMP_NUM_THREADS=1 "$BIN/python" -m demo.build_teacher --text "$OUT/text.jsonl" "$OUT/more.jsonl" --work-dir "$OUT/work" --out "$OUT/base" \
    --steps "$WARM_UP_STEPS" --minutes 100000 --learning-rate 0.002

# Listening: German, Chinese and the transcript of each sentence. Float order on other machines changes the digits, not the quality.
"$BIN/halve" teach --model "$OUT/base" --corpus "$OUT/corpus" --states-dir "$OUT/states" --lang de --lang zh --transcribe \
    --max-steps "$TEACH_STEPS" --epochs 30 --batch-size 48 --learning-rate 7e-4 --schedule linear --warmup 0.02 --weight-decay 0.01 \
    --label-smoothing 0.1 --spec-mask 0.08 --projector-factor 2 --projector-only-steps 60 \
    --eval-every 500 --select-segments 60 --checkpoint-every 100 --out "$OUT/teacher"
