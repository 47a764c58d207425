#!/usr/bin/env bash
# Times halve beside other runtimes on the same weights, two shapes: the demo's teacher, and a generated decoder
# of 12 layers x 512. Each takes about 6 minutes on 2 cores, after conversions that are kept in runs/peers.
#   bash benchmarks/latency_peers.sh [prepare | demo | wide | rivals]      without a name: the first three
# rivals: int4 packages and genai's int4 in turns, clip by clip, for ratios that the machine's moods do not make.
set -euo pipefail
cd "$(dirname "$0")/.."
HALVE=${HALVE:-.venv/bin/halve}
REPEATS=${REPEATS:-5}
THREADS=${THREADS:-2}
IN=runs/latency
OUT=${OUT:-runs/latency-peers}
PEERS=${PEERS:-transformers-fp32 transformers-fp32-cut transformers-bf16 transformers-nf4 torch-onnx-fp32 torch-onnx-int8
    torch-onnx-int4 genai-int4 genai-int4-block128 genai-int4-kv8 optimum-fp32 optimum-int8 ctranslate2-int8 llama.cpp-f16 llama.cpp-q8_0 llama.cpp-q4_0}

# As packages without a corpus are made, but for the cache.
KV8=(--kv-bits 8 --corpus demo/corpus --quantise search --encoder-bits 8 --calibration-segments 32 --parity-segments 24)

package() { # MODEL NAME PRECISION [OPTION…]
    test -d "$IN/$2" || "$HALVE" package --model "$1" --precision "$3" --lang de --out "$IN/$2" "${@:4}"
}

gguf() { # SHAPE: its GGUF package, where there is one
    if test -d "$IN/$1-gguf-int4"; then echo "$IN/$1-gguf-int4"; fi
}

trimmed() { # SHAPE: its trimmed package, where there is one
    if test -d "$IN/$1-kv8-trimmed"; then echo "$IN/$1-kv8-trimmed"; fi
}

prepare() {
    test -d "$IN/wide" || "${HALVE%halve}python" -m benchmarks.shapes --like demo/teacher --layers 12 --hidden 512 --out "$IN/wide"
    test -d "$IN/nine" || "$HALVE" prune --model demo/teacher --layers 3,4,9 --out "$IN/nine"
    for SHAPE in teacher wide; do
        MODEL=$IN/wide
        if [ $SHAPE = teacher ]; then MODEL=demo/teacher; fi
        package $MODEL $SHAPE-int4 int4 --block-size 128
        package $MODEL $SHAPE-int4-block32 int4 --block-size 32
        # Random weights translate nothing: their check on `select` is made by force.
        package $MODEL $SHAPE-kv8 int4 --block-size 128 "${KV8[@]}" --force
        package $MODEL $SHAPE-fp32 fp32
        if "${HALVE%halve}python" -c "import llama_cpp" 2> /dev/null; then package $MODEL $SHAPE-gguf-int4 int4 --target gguf; fi
    done
    package "$IN/nine" nine-int4 int4 --block-size 128
    package demo/teacher teacher-kv8-trimmed int4 --block-size 128 "${KV8[@]}" --trim-vocab
}

bench() { # NAME MODELS…
    local NAME=$1
    shift
    # shellcheck disable=SC2086  the peers are a list
    "$HALVE" bench latency --models "$@" --corpus demo/corpus --lang de --threads 1 --also-threads "$THREADS" \
        --new-tokens 32 --repeats "$REPEATS" --warmup 1 --peers $PEERS --peer-folder runs/peers --out "$OUT/$NAME"
}

rivals() {
    for SHAPE in teacher wide; do
        MODEL=$IN/wide
        if [ $SHAPE = teacher ]; then MODEL=demo/teacher; fi
        # shellcheck disable=SC2046  a name or nothing
        "${HALVE%halve}python" -m benchmarks.rivals --model $MODEL --packages "$IN/$SHAPE-int4" "$IN/$SHAPE-kv8" $(trimmed $SHAPE) \
            --corpus demo/corpus --lang de --threads 1 "$THREADS" --rounds "${ROUNDS:-40}" --out "$OUT/rivals-$SHAPE"
    done
}

for PART in "${@:-prepare demo wide}"; do
    for ONE in $PART; do
        case $ONE in
            prepare) prepare ;;
            rivals) rivals ;;
            demo) bench demo demo/teacher $IN/teacher-int4 $IN/teacher-int4-block32 $IN/teacher-kv8 $IN/nine-int4 $IN/teacher-fp32 $(gguf teacher) ;;
            wide) bench wide $IN/wide $IN/wide-int4 $IN/wide-int4-block32 $IN/wide-kv8 $IN/wide-fp32 $(gguf wide) ;;
        esac
    done
done
