"""The names of the peers, apart from what runs them: the command line reads them."""

from typing import Literal

PeerName = Literal[
    "transformers-fp32",
    "transformers-fp32-cut",
    "transformers-bf16",
    "transformers-nf4",
    "torch-onnx-fp32",
    "torch-onnx-int8",
    "torch-onnx-int4",
    "genai-int4",
    "genai-int4-block128",
    "genai-int4-kv8",
    "optimum-fp32",
    "optimum-int8",
    "ctranslate2-int8",
    "llama.cpp-f16",
    "llama.cpp-q8_0",
    "llama.cpp-q4_0",
]
