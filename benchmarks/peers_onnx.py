"""Other ways to run the same decoder in onnxruntime, all installable as wheels.

Each class is one peer: `prepare` converts the text model once, an instance loads and runs it. None of
them uses anything of halve's.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Said = tuple[float, float, list[int]]
"""Seconds to the first token, seconds in all, tokens."""
GRAPH = "model.onnx"


def read_bytes(graph_path: Path) -> int:
    """Bytes of weights in a graph that a token reads: all but tables that rows are gathered from.

    bfloat16 values are cast to float32 when the graph is loaded and count so.
    """
    import onnx

    model = onnx.load(str(graph_path), load_external_data=False)
    gathered = {
        node.input[0]
        for node in model.graph.node
        if node.op_type.startswith("Gather") and node.input
    }
    wide = {onnx.TensorProto.BFLOAT16}
    total = 0
    for tensor in model.graph.initializer:
        if tensor.name not in gathered:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            size = int(facts["length"]) if "length" in facts else len(tensor.SerializeToString())
            total += size * (2 if tensor.data_type in wide else 1)
    return total


class TorchOnnx:
    """`torch.onnx.export` (dynamo) of the stock class with its cache, in a plain session loop."""

    quantised: str | None = None

    @staticmethod
    def prepare(text_model: Path, out: Path) -> None:
        """Exports the decoder: embeddings and cache in, logits and grown cache out."""
        _export(text_model, out / GRAPH)

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(folder / GRAPH), options, providers=["CPUExecutionProvider"]
        )
        self._table = np.load(folder.parent / "table.npy", mmap_mode="r")
        self._past = [node for node in self._session.get_inputs() if node.name.startswith("past")]
        self.weight_bytes = read_bytes(folder / GRAPH)

    def run(self, prompt: dict[str, NDArray[Any]], count: int) -> Said:
        """Says `count` tokens after a prompt."""
        started = time.perf_counter()
        feed = {"inputs_embeds": prompt["embeddings"][None]}
        for node in self._past:
            feed[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        tokens: list[int] = []
        length, first_s = 0, 0.0
        while len(tokens) < count:
            length += feed["inputs_embeds"].shape[1]
            feed["attention_mask"] = np.ones((1, length), np.int64)
            logits, *cache = self._session.run(None, feed)
            row = logits[0, -1]
            row[prompt["ends"]] = -np.inf
            tokens.append(int(row.argmax()))
            first_s = first_s or time.perf_counter() - started
            feed = {"inputs_embeds": np.asarray(self._table[tokens[-1:]])[None]}
            feed |= dict(zip((node.name for node in self._past), cache, strict=True))
        return first_s, time.perf_counter() - started, tokens


class TorchOnnxInt8(TorchOnnx):
    """The same graph through onnxruntime's `quantize_dynamic`: int8 weights and activations."""

    @staticmethod
    def prepare(text_model: Path, out: Path) -> None:
        """Exports, then quantises."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        plain = _exported_beside(text_model, out)
        quantize_dynamic(plain, out / GRAPH, weight_type=QuantType.QInt8)


class TorchOnnxInt4(TorchOnnx):
    """The same graph through onnxruntime's MatMulNBitsQuantizer: 4-bit weights, int8 arithmetic."""

    @staticmethod
    def prepare(text_model: Path, out: Path) -> None:
        """Exports, then quantises."""
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        model = onnx.load(str(_exported_beside(text_model, out)))
        quantiser = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, accuracy_level=4)
        quantiser.process()
        quantiser.model.save_model_to_file(str(out / GRAPH), use_external_data_format=True)


def _exported_beside(text_model: Path, out: Path) -> Path:
    """The fp32 graph; the fp32 peer's where that was prepared before."""
    plain = out.parent / "torch-onnx-fp32" / GRAPH
    if not plain.is_file():
        plain.parent.mkdir(parents=True, exist_ok=True)
        _export(text_model, plain)
    return plain


def _export(text_model: Path, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        str(text_model), dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train(False)
    text = model.config
    heads = text.num_key_value_heads
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs_embeds: Any, attention_mask: Any, past: list[Any]) -> Any:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            out = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            grown = out.past_key_values.layers
            return out.logits, [part for kept in grown for part in (kept.keys, kept.values)]

    steps, before = 3, 5
    past = [torch.randn(1, heads, before, channels) for _ in range(2 * text.num_hidden_layers)]
    inputs = torch.randn(1, steps, text.hidden_size)
    mask = torch.ones(1, before + steps, dtype=torch.long)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({1: dynamic}, {1: dynamic}, [{2: dynamic} for _ in past])
    names = [f"past.{index}" for index in range(len(past))]
    with torch.no_grad():
        program = torch.onnx.export(
            Step(),
            (inputs, mask, past),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["inputs_embeds", "attention_mask", *names],
            output_names=["logits", *(f"grown.{index}" for index in range(len(past)))],
            opset_version=20,
            verbose=False,
        )
    assert program is not None  # None only where the old exporter is asked for
    program.save(str(path), external_data=True)


class Genai:
    """onnxruntime-genai: its builder's int4 graph, driven by its own generator."""

    options: tuple[str, ...] = ()
    """Of the builder, beside its defaults (blocks of 32 weights) and 8-bit arithmetic, the fastest here."""

    @classmethod
    def prepare(cls, text_model: Path, out: Path) -> None:
        """Builds the graph as its command line does."""
        cls.build(text_model, out, cls.options)

    @staticmethod
    def build(text_model: Path, out: Path, options: Sequence[str]) -> None:
        """Runs the builder; an option that it does not know it ignores without a word."""
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(text_model), "-o", str(out), "-p", "int4", "-e", "cpu"]
        command += ["-c", str(out / "cache"), "--extra_options", "int4_accuracy_level=4", *options]
        subprocess.run(command, check=True)
        wanted = dict(option.split("=", 1) for option in options).get("block_size")
        if wanted and (found := _block_sizes(out / GRAPH)) != {int(wanted)}:
            raise SystemExit(f"The builder wrote blocks of {found}, not {wanted}")

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        path = folder / "genai_config.json"
        settings = json.loads(path.read_text(encoding="utf8"))
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(settings, indent=2), encoding="utf8")
        self._library = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self.weight_bytes = read_bytes(folder / GRAPH)

    def run(self, prompt: dict[str, NDArray[Any]], count: int) -> Said:
        """Says `count` tokens after a prompt."""
        started = time.perf_counter()
        ids = prompt["ids"].astype(np.int32)
        params = self._library.GeneratorParams(self._model)
        length = len(ids) + count
        params.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(ids)
        tokens: list[int] = []
        first_s = 0.0
        while len(tokens) < count:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first_s = first_s or time.perf_counter() - started
        return first_s, time.perf_counter() - started, tokens


class GenaiBlock128(Genai):
    """The same with a scale for 128 weights, beside halve's packages of `--block-size 128`."""

    options = ("block_size=128",)


class GenaiKv8(GenaiBlock128):
    """That with keys and values in 8 bits, a scale a layer: what they reach at most after the prompts.

    genai's own tool for these scales reads texts through a tokenizer; the prompts here are given as tokens. How fast a
    step is does not depend on them.
    """

    @classmethod
    def prepare(cls, text_model: Path, out: Path) -> None:
        """Builds the graph without them, reads the prompts, and builds it again."""
        plain = out / "plain"
        cls.build(text_model, plain, cls.options)
        scales = out / "scales.json"
        scales.write_text(json.dumps({"scales": _cache_scales(plain / GRAPH, text_model)}))
        shutil.rmtree(plain)
        kept = ("kv_cache_quant_scheme=int8_per_tensor", f"kv_cache_scale_file={scales}")
        cls.build(text_model, out, (*cls.options, *kept))
        if not _has_bytes(out / GRAPH):
            raise SystemExit("The builder kept keys and values as they are computed")


def _has_bytes(graph: Path) -> bool:
    """Whether a graph takes keys and values in 8 bits."""
    import onnx

    inputs = onnx.load(str(graph), load_external_data=False).graph.input
    return any(each.type.tensor_type.elem_type == onnx.TensorProto.INT8 for each in inputs)


def _block_sizes(graph: Path) -> set[int]:
    import onnx

    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    return {
        attribute.i
        for node in nodes
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "block_size"
    }


def _cache_scales(graph: Path, text_model: Path) -> dict[str, list[float]]:
    """What a code of 1 of each layer's keys and values stands for."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    settings = json.loads((graph.parent / "genai_config.json").read_text(encoding="utf8"))
    decoder = settings["model"]["decoder"]
    shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    peaks: dict[str, NDArray[Any]] = {}
    for path in sorted(text_model.glob("prompt-*.npz")):
        ids = np.load(path)["ids"][None].astype(np.int64)
        feed: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for node in session.get_inputs():
            if node.name.startswith("past"):
                feed[node.name] = np.zeros(shape, np.float32)
        names = [node.name for node in session.get_outputs()]
        for name, states in zip(names, session.run(names, feed), strict=True):
            peaks[name] = np.maximum(peaks.get(name, 0.0), np.abs(states).max())
    layers = range(decoder["num_hidden_layers"])
    return {
        f"{part[0]}_scales": [float(peaks[f"present.{layer}.{part}"]) / 127 for layer in layers]
        for part in ("key", "value")
    }
