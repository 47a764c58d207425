"""Text runtimes that need an environment of their own: optimum, CTranslate2, llama.cpp.

Imported only by `benchmarks.peer_worker` under the Python of that environment: nothing of halve may be
imported here.
"""

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers_onnx import GRAPH, Said, read_bytes


class Optimum:
    """optimum's exporter and its `generate` on onnxruntime, float32."""

    @staticmethod
    def prepare(text_model: Path, out: Path) -> None:
        """Exports as `optimum-cli export onnx --task text-generation-with-past` does."""
        from optimum.onnxruntime import ORTModelForCausalLM

        ORTModelForCausalLM.from_pretrained(str(text_model), export=True).save_pretrained(str(out))

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._model = ORTModelForCausalLM.from_pretrained(str(folder), session_options=options)
        self.weight_bytes = read_bytes(next(folder.glob("*.onnx")))

    def run(self, prompt: dict[str, NDArray[Any]], count: int) -> Said:
        """Says `count` tokens after a prompt; the first token's time is that of a run for one."""
        first_s, _ = self._generate(prompt["ids"], 1)
        total_s, tokens = self._generate(prompt["ids"], count)
        return first_s, total_s, tokens

    def _generate(self, ids: NDArray[Any], count: int) -> tuple[float, list[int]]:
        import torch

        rows = torch.from_numpy(ids)[None]
        started = time.perf_counter()
        said = self._model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        return time.perf_counter() - started, said[0, len(ids) :].tolist()


class OptimumInt8(Optimum):
    """The same through optimum's dynamic quantisation for avx512-vnni."""

    @staticmethod
    def prepare(text_model: Path, out: Path) -> None:
        """Exports, then quantises."""
        from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        plain = out / "float"
        model = ORTModelForCausalLM.from_pretrained(str(text_model), export=True)
        model.save_pretrained(str(plain))
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        ORTQuantizer.from_pretrained(str(plain), file_name=GRAPH).quantize(
            save_dir=str(out), quantization_config=settings
        )
        for name in ("config.json", "generation_config.json"):
            (out / name).write_bytes((plain / name).read_bytes())


class CTranslate2:
    """CTranslate2 with int8 weights."""

    @staticmethod
    def prepare(text_model: Path, out: Path) -> None:
        """Converts as `ct2-transformers-converter` does."""
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(text_model)).convert(str(out), quantization="int8", force=True)

    def __init__(self, folder: Path, threads: int) -> None:
        import ctranslate2
        from tokenizers import Tokenizer

        self._generator = ctranslate2.Generator(
            str(folder), device="cpu", inter_threads=1, intra_threads=threads, compute_type="int8"
        )
        self._tokenizer = Tokenizer.from_file(str(folder.parent / "text" / "tokenizer.json"))
        table_bytes = np.load(folder.parent / "table.npy", mmap_mode="r").size
        self.weight_bytes = (folder / "model.bin").stat().st_size - table_bytes

    def run(self, prompt: dict[str, NDArray[Any]], count: int) -> Said:
        """Says `count` tokens after a prompt; the first token's time is that of a run for one."""
        names = [self._tokenizer.id_to_token(int(token)) for token in prompt["ids"]]
        first_s, _ = self._generate(names, 1)
        total_s, tokens = self._generate(names, count)
        return first_s, total_s, tokens

    def _generate(self, names: list[str | None], count: int) -> tuple[float, list[int]]:
        started = time.perf_counter()
        rows = self._generator.generate_batch(
            [names],
            beam_size=1,
            min_length=count,
            max_length=count,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - started, list(rows[0].sequences_ids[0])


class LlamaCpp:
    """llama.cpp through llama-cpp-python: half-precision or quantised weights, embeddings fed in."""

    kind = "f16"

    @classmethod
    def prepare(cls, text_model: Path, out: Path) -> None:
        """Writes the decoder in half precision and lets llama.cpp quantise it."""
        import llama_cpp

        half = out / ("model.gguf" if cls.kind == "f16" else "half.gguf")
        _write_half(text_model, half)
        if cls.kind == "f16":
            return
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{cls.kind.upper()}")
        made = llama_cpp.llama_model_quantize(
            str(half).encode(), str(out / "model.gguf").encode(), ctypes.byref(params)
        )
        if made != 0:
            raise RuntimeError(f"llama_model_quantize answered {made}")

    def __init__(self, folder: Path, threads: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._llama = llama_cpp.Llama(
            str(folder / "model.gguf"),
            n_ctx=1024,
            n_batch=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.weight_bytes = _gguf_bytes(folder / "model.gguf")

    def run(self, prompt: dict[str, NDArray[Any]], count: int) -> Said:
        """Says `count` tokens after a prompt of token ids."""
        started = time.perf_counter()
        llama, ends = self._llama, prompt["ends"]
        llama.reset()
        llama.eval(prompt["ids"].tolist())
        tokens: list[int] = []
        first_s = 0.0
        size = llama.n_vocab()
        while True:
            row = np.ctypeslib.as_array(
                self._library.llama_get_logits_ith(llama.ctx, -1), shape=(size,)
            )
            row[ends] = -np.inf
            tokens.append(int(row.argmax()))
            first_s = first_s or time.perf_counter() - started
            if len(tokens) == count:
                return first_s, time.perf_counter() - started, tokens
            llama.eval(tokens[-1:])


class LlamaCppQ8(LlamaCpp):
    """8-bit weights."""

    kind = "q8_0"


class LlamaCppQ4(LlamaCpp):
    """4-bit weights."""

    kind = "q4_0"


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _write_half(text_model: Path, path: Path) -> None:
    """Writes a GGUF file of matrices in float16 and vectors in float32, without a tokenizer."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((text_model / "config.json").read_text(encoding="utf8"))
    writer = gguf.GGUFWriter(str(path), config["model_type"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for key, values in load_file(str(text_model / "model.safetensors")).items():
        kind = np.float16 if values.ndim > 1 else np.float32
        writer.add_tensor(_gguf_name(key), values.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(key: str) -> str:
    stem, _, kind = key.rpartition(".")
    if stem in _GGUF_ENDS:
        return f"{_GGUF_ENDS[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def _gguf_bytes(path: Path) -> int:
    """Bytes of tensors that a token reads: all but the embedding table."""
    import gguf

    tensors = gguf.GGUFReader(str(path)).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")
