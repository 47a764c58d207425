"""Whisper goes the whole road: its decoder's layers attend to an encoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration

from compress.config import DistillConfig, ImportanceConfig, PruneConfig, TuneConfig
from compress.criteria import spaced
from compress.cross import CrossTranslator
from compress.distill import run_distill
from compress.footprint import Room
from compress.importance import make_task, run_importance
from compress.prune import run_prune
from compress.reference import StockTranslator
from compress.search import Ledger, Search, greedy, plan_chunks, translator_for
from compress.task import SearchTask
from compress.tune import run_tune
from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from export.runtime import open_translator
from halve.corpus import read_corpus
from halve.errors import FamilyError
from halve.families import FAMILIES, SourceText, family_for
from halve.json_files import read_jsonl
from halve.languages import language
from halve.models import SpeechModel, load_model, read_config
from halve.translate import TorchTranslator
from tests import tiny
from tests.families.whisper_models import make_whisper

FAMILY = FAMILIES["whisper"]


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("whispers") / "whisper", seed=2)


@pytest.fixture(scope="module")
def opened(whisper: Path, tiny_corpus: Path) -> tuple[SpeechModel, SearchTask]:
    speech = load_model(whisper)
    corpus = read_corpus(tiny_corpus)
    task = make_task(speech, corpus, corpus.split("select", "de", 4), "de", "chrf++")
    return speech, replace(task, limits=(8, 12, 16, 14))


def test_parameters_are_those_of_the_class(whisper: Path) -> None:
    for path, changes in ((whisper, {}), (whisper, {"decoder_layers": 3, "vocab_size": 700})):
        facts = read_config(path) | changes
        config = WhisperForConditionalGeneration.config_class(**facts)
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
        counts = family_for(facts).count_parameters(facts)
        assert counts.total == sum(weight.numel() for weight in model.parameters())
        tower = sum(weight.numel() for weight in model.model.encoder.parameters())
        assert counts.audio_tower == tower
        layer = sum(weight.numel() for weight in model.model.decoder.layers[0].parameters())
        assert counts.per_layer == layer


def test_beams_are_those_of_stock_code(whisper: Path) -> None:
    speech = load_model(whisper)
    translator = TorchTranslator(speech)
    clips = [tiny.tone(seconds, index) for index, seconds in enumerate((1.2, 0.7, 2.0))]
    limits = [12, 4, 9]
    together = translator.translate(clips, "de", limits=limits, beams=3, batch_size=9)
    for clip, limit, found in zip(clips, limits, together, strict=True):
        prompt = FAMILY.instruction(language("de"))
        inputs = FAMILY.stock_inputs(speech.processor, clip, prompt, torch.float32)
        settings = speech.model.generation_config
        said = FAMILY.stock_generate(
            speech.model, inputs, generation_config=settings, max_new_tokens=limit, num_beams=3
        )
        ends = FAMILY.end_ids(speech.model)
        assert found.tokens == [token for token in said if token not in ends]


def test_the_prompt_names_the_target_language() -> None:
    german, english = language("de"), language("en")
    wanted = "<|startoftranscript|><|de|><|{}|><|notimestamps|>"
    assert FAMILY.instruction(german) == wanted.format("transcribe")
    assert FAMILY.instruction(english, german) == wanted.format("translate")
    assert FAMILY.transcription(german) == wanted.format("transcribe")


def test_a_pruned_model_says_in_stock_code_what_halve_says(whisper: Path, tmp_path: Path) -> None:
    run_prune(PruneConfig(layers=(1, 4), verify="full"), whisper, None, tmp_path / "pruned")
    pruned = read_config(tmp_path / "pruned")
    assert (pruned["decoder_layers"], pruned["encoder_layers"]) == (4, 2)
    generation = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    assert generation["alignment_heads"] == [[1, 3], [3, 2]], "those of layers 1 and 4 went"
    clips = [tiny.tone(1.2, 1), tiny.tone(0.7, 2), tiny.tone(2.0, 3)]
    translator = TorchTranslator(load_model(tmp_path / "pruned"))
    found = translator.translate(clips, "de", limits=[14, 14, 14])
    assert len({tuple(row.tokens) for row in found}) == 3
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "pruned")
    processor = AutoProcessor.from_pretrained(tmp_path / "pruned")
    ends = translator.speech.family.end_ids(model)
    for clip, row in zip(clips, found, strict=True):
        features = processor(clip, sampling_rate=16_000, return_tensors="pt").input_features
        said = model.generate(features, language="de", task="transcribe", max_new_tokens=14)[
            0
        ].tolist()
        prompt = [
            i
            for part in FAMILY.prompt_ids(processor, FAMILY.instruction(language("de")))
            for i in part
        ]
        said = said[len(prompt) :] if said[: len(prompt)] == prompt else said
        assert [token for token in said if token not in ends] == row.tokens
    assert "".join(translator.stream(clips[2], "de", limit=14)) == found[2].text


def run(translator: Any, kept: list[int], drafts: Any, candidates: list[int | None]) -> Any:
    """Everything that a translator's run yields."""
    with translator:
        rows = range(len(translator.task.ids))
        runs = translator.run(kept, drafts, translator.groups(candidates), rows)
        return {layer: tokens for found in runs for layer, tokens in found.items()}


def test_every_candidate_has_the_reference_tokens(opened: tuple[SpeechModel, SearchTask]) -> None:
    speech, task = opened
    layers, candidates = list(range(6)), [1, 3, 4, None]
    nothing: list[list[int]] = [[] for _ in task.ids]
    assert isinstance(translator_for("exact", speech, task), CrossTranslator)
    wanted = run(StockTranslator(speech, task), layers, nothing, candidates)
    parent = run(CrossTranslator(speech, task), layers, nothing, [None])[None]
    assert run(CrossTranslator(speech, task), layers, parent, candidates) == wanted
    # Whatever the draft says, a candidate's own tokens come out.
    wild = [[7, 8, 9], wanted[3][1], [*wanted[3][2][:2], 33, 44], []]
    assert run(CrossTranslator(speech, task), layers, wild, [3])[3] == wanted[3]
    kept = [0, 2, 3, 5]
    pruned = run(StockTranslator(speech, task, deep_copy=False), kept, nothing, [2, None])
    assert run(CrossTranslator(speech, task), kept, parent, [2, None]) == pruned
    assert len({len(row) for rows in wanted.values() for row in rows}) > 1


def test_same_order_as_the_reference(
    opened: tuple[SpeechModel, SearchTask], tmp_path: Path
) -> None:
    speech, task = opened
    rankings = []
    for method, most in (("reference", 4), ("exact", 4), ("exact", 1)):
        with translator_for(method, speech, task) as translator:
            ledger = Ledger(tmp_path / f"{method}-{most}.jsonl")
            lengths = [len(clip) for clip in task.audio]
            planned = plan_chunks(Room(translator.footprint(), 10**9).fits, lengths, most)
            chunks = ledger.chunks(planned.copy)
            search = Search(translator, task, ledger, chunks, lambda *_, **__: None)
            rankings.append(greedy(search, 6, 2))
    assert rankings[0] == rankings[1] == rankings[2]


def test_memory_is_planned_for_text_as_long_as_the_longest_row(
    opened: tuple[SpeechModel, SearchTask],
) -> None:
    speech, task = opened
    needs = CrossTranslator(speech, replace(task, limits=(4, 4, 80, 4))).footprint()
    states = 4 * 64 * 1500
    assert needs.held == 4 * states
    held, alone = needs.held, needs.most([[2]]) - needs.held
    assert needs.most([range(4)]) == held + 4 * alone
    assert needs.most([[0], [2]]) == held + alone > needs.most([[0]])
    # For the chunk and for rows decoding: the states, and keys and values of them in six layers.
    assert needs.rows[2] == 2 * (1 + 2 * 6) * states


def test_spaced_layers_are_those_of_distil_whisper() -> None:
    assert spaced(12, range(1, 11), 10) == tuple(range(1, 11))
    assert spaced(6, range(1, 5), 2) == (2, 4)
    assert spaced(32, range(1, 31), 28) == tuple(n for n in range(1, 31) if n not in (10, 20))
    assert spaced(6, (1, 3), 2) == (1, 3), "others go where some must stay"


def test_importance_by_spacing_and_what_cannot_rank(
    whisper: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = ImportanceConfig(remove=3, lang="de", method="spaced")
    made = run_importance(config, whisper, tiny_corpus, tmp_path / "spaced")
    assert made.extra["removed"] == [1, 3, 4]
    config = ImportanceConfig(remove=1, lang="de", method="loss", segments=2)
    with pytest.raises(FamilyError, match="attend to an encoder"):
        run_importance(config, whisper, tiny_corpus, tmp_path / "loss")
    config = ImportanceConfig(remove=1, lang="de", shortlist=2, segments=2)
    with pytest.raises(FamilyError, match=r"--shortlist .by block-influence. is not supported"):
        run_importance(config, whisper, tiny_corpus, tmp_path / "listed")


def test_qlora_merge_and_packages(whisper: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    distilled = run_distill(
        DistillConfig(langs=("de", "zh"), batch_size=6, min_score=0),
        whisper,
        tiny_corpus,
        tmp_path / "t",
    )
    assert distilled.extra["translations"] == 24
    config = TuneConfig(
        langs=("de", "zh"), epochs=2, rank=4, alpha=8, learning_rate=1e-2, precision="float32",
        select_segments=0,
    )  # fmt: skip
    run_tune(config, whisper, tiny_corpus, tmp_path / "t", tmp_path / "adapter")
    losses = [
        line["loss"]
        for line in read_jsonl(tmp_path / "adapter" / "history.jsonl")
        if "loss" in line
    ]
    assert losses[-1] < losses[0]
    onto = MergeConfig(dtype="float32")
    run_merge(onto, whisper, tmp_path / "adapter", None, tmp_path / "student")
    clip = tiny.tone(1.0, 9)
    merged = load_model(tmp_path / "student")
    adapted = load_model(whisper, adapter=tmp_path / "adapter")
    inputs = FAMILY.stock_inputs(
        merged.processor, clip, FAMILY.instruction(language("de")), torch.float32
    )
    with torch.inference_mode():
        logits = [
            speech.model(**inputs).logits for speech in (merged, adapted, load_model(whisper))
        ]
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    assert (logits[0] - logits[2]).abs().max() > 0.05, "the adapter changes something"
    for precision in ("fp32", "nf4"):
        config_ = PackageConfig(
            target="checkpoint", precision=precision, langs=("de",), max_drop=100
        )
        made = run_package(config_, tmp_path / "student", tiny_corpus, tmp_path / precision)
        assert made.extra["parity_passed"]
    translator = open_translator(tmp_path / "fp32", dtype="float32")
    found = translator.translate([clip], "de", limits=[10])[0]
    assert found.tokens == TorchTranslator(merged).translate([clip], "de", limits=[10])[0].tokens
    with pytest.raises(FamilyError, match="attend to an encoder"):
        run_package(
            PackageConfig(target="onnx", precision="fp32", langs=("de",)),
            tmp_path / "student", None, tmp_path / "onnx",
        )  # fmt: skip


def test_shared_branches_lose_what_single_rows_lose(whisper: Path, tiny_corpus: Path) -> None:
    from compress.collate import collate
    from compress.rows import Row, build_sequences
    from tests.losses import sequence_loss

    speech = load_model(whisper)
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("train")[:2]
    rows = [
        Row(each.id, "de", text, "teacher") for each in segments for text in ("die Datei", "alt")
    ]
    states = [
        speech.family.encode(speech.model, speech.processor, corpus.audio(segment))
        for segment in segments
    ]

    def loss(share: bool) -> float:
        sequences = build_sequences(speech, segments, rows, share)
        heard = torch.cat([states[sequence.segment] for sequence in sequences])
        batch = collate(sequences, [0] * len(sequences))
        return float(sequence_loss(speech, batch, heard).detach())

    assert loss(True) == pytest.approx(loss(False), rel=1e-5)
    labels = speech.processor(text="die Datei", return_tensors="pt").input_ids
    assert labels.shape[0] == 1


def test_it_does_not_read(whisper: Path) -> None:
    with pytest.raises(FamilyError, match="do not read"):
        FAMILY.source_ids(None, "", SourceText("a"))
    speech = load_model(whisper)
    with pytest.raises(FamilyError, match=r"no <\|fr\|>"):
        FAMILY.prompt_ids(speech.processor, FAMILY.instruction(language("fr")))
