"""The layer search and QLoRA at Qwen2-Audio-7B's true shape, with random weights made on the GPU.

    python -m benchmarks.full_size search --out DIR     one round of `exact`, and a sample of the reference
    python -m benchmarks.full_size tune --out DIR       QLoRA steps, from a checkpoint written to DIR's disk

What the weights say is noise, so nothing here is about quality: each translation is as long as its reference
has tokens, and how far a layer's absence changes it is set by --added, the share that a layer adds to what
passes through it (the demo's candidates keep a fifth of their parent's tokens before they go on by themselves).
"""

import argparse
import copy
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.big_checkpoint import config_of
from benchmarks.scaling import Stopwatch
from halve import environment
from halve.json_files import read_json, write_json
from halve.models import SpeechModel, load_processor

_ROOT = Path(__file__).resolve().parents[1]
_LIKE = _ROOT / "demo" / "teacher"
_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
ROUNDS = 8
"""Layers that the paper's search removes."""


def make(
    folder: Path, layers: int, added: float, device: str, dtype: str, like: Path = _LIKE
) -> SpeechModel:
    """The shape with random weights, made on the device; its small files go to `folder`.

    Args:
        added: what each decoder layer's last matrices are scaled by.
    """
    import torch
    import transformers

    from halve.families import family_for

    folder.mkdir(parents=True, exist_ok=True)
    for name in _SIDE_FILES:
        shutil.copyfile(like / name, folder / name)
    config = config_of(layers)
    processor = read_json(like / "processor_config.json")
    processor["feature_extractor"]["feature_size"] = config["audio_config"]["num_mel_bins"]
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "config.json", config)
    family = family_for(config)
    loader = getattr(transformers, family.auto_class)
    torch.manual_seed(0)
    environment.leave_out_cudnn_attention()
    with torch.device(device):
        model = loader.from_config(
            transformers.AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype)
        )
    model.eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    speech = SpeechModel(model, load_processor(folder), family, folder, device, dtype)
    with torch.no_grad():
        # Inputs of the size that normed states have: else the first layer is all there is.
        speech.part(family.embeddings).weight.normal_()
        for layer in speech.part(family.layers):
            layer.self_attn.o_proj.weight.mul_(added)
            layer.mlp.down_proj.weight.mul_(added)
    return speech


def make_search_task(speech: SpeechModel, corpus: Path, lang: str, count: int) -> Any:
    """Segments of `select`, each translation limited to its reference's tokens: random weights end none."""
    from compress.importance import make_task
    from halve.corpus import read_corpus
    from halve.languages import language

    heard = read_corpus(corpus)
    segments = heard.split("select", lang, count)
    task = make_task(speech, heard, segments, lang, language(lang).selection_metric)
    tokenizer = speech.processor.tokenizer
    limits = tuple(len(tokenizer(text)["input_ids"]) + 1 for text in task.references)
    return dataclasses.replace(task, limits=limits)


def search(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times one round of `exact` on all segments, and the reference on a sample of them."""
    import torch

    from compress.config import ImportanceConfig
    from compress.importance import by_translation
    from compress.search import Ledger

    speech = make(folder, given.layers, given.added, given.device, given.dtype)
    task = make_search_task(speech, given.corpus, given.lang, given.segments)
    sample = _reference_sample(speech, task, given)
    config = ImportanceConfig.model_validate(
        {
            "remove": 1,
            "lang": given.lang,
            "dtype": given.dtype,
            "memory_gb": given.memory_gb,
            "batch_size": given.batch_size,
        }
    )
    _forget_peak(given.device)
    loaded_bytes = _gpu_bytes(given.device)
    ledger, watch = Ledger(folder / "ledger.jsonl"), Stopwatch()
    ranking = by_translation(config, speech, task, ledger, watch)
    exact_s = time.perf_counter() - watch.started_s
    candidates = len(ranking.candidates)
    peak_bytes = torch.cuda.max_memory_allocated() if given.device == "cuda" else None
    found = _by_layer(ledger, [candidate.layer for candidate in ranking.candidates], task)
    parent = _by_layer(ledger, [None], task)[None]
    per_candidate = (exact_s - watch.whole_s) / candidates
    rounds = min(ROUNDS, given.layers - 2)
    tried = sum(given.layers - 2 - done for done in range(rounds))
    return {
        "segments": len(task.ids),
        "candidates": candidates,
        "tokens_per_segment": sum(task.limits) / len(task.limits),
        "audio_s": sum(len(audio) for audio in task.audio) / 16000,
        "kept_of_drafts": _kept(parent, found),
        "chunks": len(ledger.chunks(list)),
        "loaded_bytes": loaded_bytes,
        "peak_bytes": peak_bytes,
        "whole_model_s": watch.whole_s,
        "exact_s_per_candidate": per_candidate,
        "same_as_reference": _same(sample.pop("tokens"), found),
        **sample,
        "ratio": sample["reference_s_per_candidate"] / per_candidate,
        "candidates_of_8_rounds": tried,
        # The whole model translates in the first round alone: a little too much.
        "exact_hours_8_rounds": (rounds * watch.whole_s + tried * per_candidate) / 3600,
        "reference_hours_8_rounds": tried * sample["reference_s_per_candidate"] / 3600,
    }


def _reference_sample(speech: SpeechModel, task: Any, given: argparse.Namespace) -> dict[str, Any]:
    """The reference's time a candidate: one copy of the model, and the sample's segments scaled up to all."""
    from compress.reference import StockTranslator, only_layers

    translator = StockTranslator(speech, task)
    translator.translate(speech.model, 0)  # the first pass pays for what later ones do not
    step = max(1, len(task.ids) // given.sample)
    rows = list(range(0, len(task.ids), step))[: given.sample]
    layer = given.layers // 2
    kept = [other for other in range(given.layers) if other != layer]
    _wait(given.device)
    started = time.perf_counter()
    model = copy.deepcopy(speech.model)
    _wait(given.device)
    copy_s = time.perf_counter() - started
    with only_layers(model, speech.family, kept):
        started = time.perf_counter()
        tokens = {row: translator.translate(model, row) for row in rows}
        _wait(given.device)
        seconds = time.perf_counter() - started
    share = sum(task.limits) / sum(task.limits[row] for row in rows)
    return {
        "sample_segments": len(rows),
        "sample_s": seconds,
        "copy_s": copy_s,
        "reference_s_per_candidate": copy_s + seconds * share,
        "tokens": (layer, tokens),
    }


def _by_layer(
    ledger: Any, layers: Sequence[int | None], task: Any
) -> dict[int | None, list[list[int]]]:
    """Tokens of every segment, by the layer left out (None: the whole model)."""
    found: dict[int | None, list[list[int]]] = {}
    for layer in layers:
        rows: list[list[int]] = [[] for _ in task.ids]
        for index, chunk in enumerate(ledger.chunks(list)):
            number = 0 if layer is None else 1
            for row, tokens in zip(chunk, ledger[number, layer, index], strict=True):
                rows[row] = tokens
        found[layer] = rows
    return found


def _kept(parent: Sequence[Sequence[int]], found: dict[int | None, list[list[int]]]) -> float:
    """The share of the parent's tokens that candidates keep before the first that differs."""
    kept = total = 0
    for rows in found.values():
        for own, draft in zip(rows, parent, strict=True):
            agreed = [a == b for a, b in zip(own, draft, strict=False)]
            kept += agreed.index(False) if False in agreed else len(agreed)
            total += len(draft)
    return kept / total


def _same(
    sample: tuple[int, dict[int, list[int]]], found: dict[int | None, list[list[int]]]
) -> float:
    """The share of the sample's translations that are the reference's, token for token."""
    layer, wanted = sample
    return sum(found[layer][row] == tokens for row, tokens in wanted.items()) / len(wanted)


def tune(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes the model to disk and takes QLoRA steps over its NF4 weights with `halve tune`'s own code."""
    import torch

    from compress.config import TuneConfig
    from compress.tune import run_tune
    from halve.json_files import read_jsonl

    speech = make(folder / "model", given.layers, given.added, given.device, given.dtype)
    started = time.perf_counter()
    speech.model.save_pretrained(folder / "model")
    written_s = time.perf_counter() - started
    del speech
    _forget_peak(given.device)
    settings = {
        "method": "qlora",
        "langs": (given.lang,),
        "max_steps": given.steps,
        "batch_size": given.batch_size,
        "select_segments": 0,
        "device": given.device,
        "rank": 64,
        "alpha": 16,
        "learning_rate": 1e-5,
    }
    run = run_tune(
        TuneConfig.model_validate(settings), folder / "model", given.corpus, None, folder / "tuned"
    )
    peak_bytes = torch.cuda.max_memory_allocated() if given.device == "cuda" else None
    seconds = sum(
        line["seconds"]
        for line in read_jsonl(run.path / "timings.jsonl")
        if line["event"] == "training"
    )
    return {
        "written_s": written_s,
        "steps": run.extra["steps"],
        "rows_per_step": given.batch_size,
        "trainable_parameters": run.extra["trainable_parameters"],
        "arithmetic": run.extra["arithmetic"],
        "training_s": seconds,
        "s_per_step": seconds / run.extra["steps"],
        "peak_bytes": peak_bytes,
    }


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _forget_peak(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _gpu_bytes(device: str) -> int | None:
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one part, prints what it found, and writes it to DIR."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=["search", "tune"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=_ROOT / "demo" / "corpus")
    parser.add_argument("--lang", default="de")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--added", type=float, default=0.1)
    parser.add_argument("--segments", type=int, default=100, help="as many as the paper's")
    parser.add_argument("--sample", type=int, default=20, help="segments of the reference")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work-dir", type=Path, help="where the checkpoint may go")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="halve-full-size-", dir=given.work_dir) as folder:
        found = {"search": search, "tune": tune}[given.part](given, Path(folder))
    found |= {
        "layers": given.layers,
        "added": given.added,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / f"{given.part}.json", found)
    for key, value in found.items():
        sys.stdout.write(f"{key}: {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
