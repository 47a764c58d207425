"""Text models of every layout go the whole road."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from compress.collate import Branch, TrainingSequence, collate
from compress.config import DistillConfig, ImportanceConfig, PruneConfig, TeachConfig, TuneConfig
from compress.distill import run_distill
from compress.exact import ExactTranslator
from compress.gradients import target_logits
from compress.importance import make_task, run_importance
from compress.prune import run_prune
from compress.reference import StockTranslator
from compress.rows import Row, build_sequences
from compress.teach import run_teach
from compress.tune import run_tune
from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from export.runtime import open_translator
from halve.card import _prompt
from halve.corpus import read_corpus
from halve.errors import ArtefactError, CorpusError, FamilyError, HalveError, InputError
from halve.families import SourceText, family_for
from halve.families.text import LAYOUTS, layer_kinds
from halve.importers import CorpusConfig, run_corpus
from halve.json_files import read_jsonl
from halve.models import SpeechModel, load_model, read_config
from halve.sources import asked, text_limit
from halve.translate import TorchTranslator
from pipeline.cli import main
from tests import tiny
from tests.families.text_models import SETTINGS, make_config, make_corpus, make_model, stock_tokens
from tests.losses import sequence_loss

TYPES = sorted(SETTINGS)


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "text")


@pytest.fixture(scope="session")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text-models")
    return {name: make_model(folder / name, name, seed=3) for name in TYPES}


@pytest.fixture(scope="session")
def llama(text_models: dict[str, Path]) -> Path:
    return text_models["llama"]


@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_and_kinds_are_those_of_the_class(model_type: str) -> None:
    assert set(TYPES) == set(LAYOUTS)
    for changes in ({}, {"num_hidden_layers": 4, "vocab_size": 640}):
        config = make_config(model_type, **changes)
        facts = json.loads(config.to_json_string())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counts = family_for(facts).count_parameters(facts)
        assert counts.total == sum(weight.numel() for weight in model.parameters())
        layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
        assert counts.per_layer == layer
        kinds = facts.pop("layer_types", None)
        if kinds:
            facts |= {key: SETTINGS[model_type][key] for key in SETTINGS[model_type]}
            assert (layer_kinds(facts) or ["full_attention"] * len(kinds)) == kinds


@pytest.mark.parametrize("model_type", TYPES)
def test_a_pruned_model_says_in_stock_code_what_halve_says(
    model_type: str, text_models: dict[str, Path], tmp_path: Path
) -> None:
    teacher = text_models[model_type]
    # A hub's config need not list the kinds of layers: pruning must not derive them anew.
    config = read_config(teacher)
    kinds = layer_kinds(config)
    run_prune(PruneConfig(layers=(1, 4), verify="full"), teacher, None, tmp_path / "pruned")
    pruned = read_config(tmp_path / "pruned")
    assert pruned["num_hidden_layers"] == 4
    if kinds is not None:
        assert pruned["layer_types"] == [kinds[layer] for layer in (0, 2, 3, 5)]
    translator = TorchTranslator(load_model(tmp_path / "pruned"))
    sources = [SourceText("open the file."), SourceText("close the old menu, insert a new page")]
    found = translator.translate(sources, "de", limits=[12, 12])
    speech = translator.speech
    for source, row in zip(sources, found, strict=True):
        ids = speech.family.source_ids(speech.processor, asked(speech.family, "de", source), source)
        said = stock_tokens(tmp_path / "pruned", ids, 12)
        ended = row.stopped == "end"
        assert [*row.tokens, *(speech.family.end_ids(speech.model)[:1] if ended else ())] == said
    assert "".join(translator.stream(sources[1], "de", limit=12)) == found[1].text


def test_a_tied_head_that_is_stored_twice(text_corpus: Path, tmp_path: Path) -> None:
    """As Qwen3 0.6B stores it: the copy stays behind; another table is none, and stock code would use it."""
    teacher = make_model(tmp_path / "teacher", "qwen3", tie_word_embeddings=True)
    file = teacher / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights
    table = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": table.clone()}, file, {"format": "pt"})
    config = PruneConfig(layers=(1, 4), verify="full")
    pruned = run_prune(config, teacher, None, tmp_path / "pruned")
    assert "lm_head.weight" not in load_file(pruned.path / "model.safetensors")
    save_file(weights | {"lm_head.weight": table + 1}, file, {"format": "pt"})
    with pytest.raises(ArtefactError, match=r"two different tables.*tie_word_embeddings"):
        run_prune(config, teacher, None, tmp_path / "other")
    search = ImportanceConfig(remove=1, lang="de", method="random")
    with pytest.raises(ArtefactError, match="two different tables"):
        run_importance(search, teacher, text_corpus, tmp_path / "importance")
    facts = read_config(teacher) | {"tie_word_embeddings": False}
    (teacher / "config.json").write_text(json.dumps(facts))
    pruned = run_prune(config, teacher, None, tmp_path / "other")
    assert "lm_head.weight" in load_file(pruned.path / "model.safetensors")


@pytest.mark.parametrize("model_type", TYPES)
def test_exact_importance_is_the_reference(
    model_type: str, text_models: dict[str, Path], text_corpus: Path
) -> None:
    speech = load_model(text_models[model_type])
    corpus = read_corpus(text_corpus)
    task = make_task(speech, corpus, corpus.split("select", "de", 3), "de", "chrf++")
    task = replace(task, limits=(10, 12, 14))
    rows, layers = range(3), list(range(6))
    nothing: list[list[int]] = [[] for _ in rows]

    def run(translator: Any, drafts: list[list[int]], layers_out: list[int | None]) -> Any:
        with translator:
            groups = translator.groups(layers_out)
            runs = translator.run(layers, drafts, groups, rows)
            return {layer: tokens for found in runs for layer, tokens in found.items()}

    wanted = run(StockTranslator(speech, task, deep_copy=False), nothing, [1, 3, None])
    parent = run(ExactTranslator(speech, task), nothing, [None])[None]
    assert run(ExactTranslator(speech, task), parent, [1, 3, None]) == wanted


def test_the_prompt_is_the_papers_and_tokenised_whole(llama: Path) -> None:
    speech = load_model(llama)
    source = SourceText(" Soubor je nový. ", "cs")
    ids = speech.family.source_ids(speech.processor, asked(speech.family, "de", source), source)
    tokenizer = speech.processor.tokenizer
    text = "Translate the following text from Czech to German:\nSoubor je nový.\n"
    chat = [{"role": "user", "content": text}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == wanted
    tokenizer.chat_template = None
    plain = speech.family.source_ids(speech.processor, asked(speech.family, "de", source), source)
    assert plain == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("model_type", ["gemma2", "llama"])
def test_qlora_then_merge(
    model_type: str, text_models: dict[str, Path], text_corpus: Path, tmp_path: Path
) -> None:
    teacher = text_models[model_type]
    distilled = run_distill(
        DistillConfig(langs=("de",), batch_size=4, min_score=0),
        teacher,
        text_corpus,
        tmp_path / "t",
    )
    assert distilled.extra["translations"] == 8
    config = TuneConfig(
        langs=("de",),
        epochs=1,
        rank=4,
        alpha=8,
        learning_rate=1e-2,
        precision="float32",
        select_segments=2,
    )
    run_tune(config, teacher, text_corpus, tmp_path / "t", tmp_path / "adapter")
    history = read_jsonl(tmp_path / "adapter" / "history.jsonl")
    assert {"score", "loss"} <= set(history[-1])
    run_merge(
        MergeConfig(onto="auto", dtype="float32"),
        teacher,
        tmp_path / "adapter",
        text_corpus,
        tmp_path / "student",
    )
    merged = load_model(tmp_path / "student")
    adapted = load_model(teacher, adapter=tmp_path / "adapter")
    run_merge(MergeConfig(dtype="float32"), teacher, tmp_path / "adapter", None, tmp_path / "onto")
    ids = torch.tensor([[5, 40, 77, 130]])
    onto = load_model(tmp_path / "onto")
    with torch.inference_mode():
        difference = onto.model(ids).logits - adapted.model(ids).logits
    assert difference.abs().max() < 1e-3
    assert merged.config["tie_word_embeddings"] == read_config(teacher)["tie_word_embeddings"]


def test_teaching_learns_and_a_second_step_costs_less(
    llama: Path, text_corpus: Path, tmp_path: Path
) -> None:
    config = TeachConfig(
        langs=("de",), epochs=6, learning_rate=3e-3, precision="float32", select_segments=0
    )
    run_teach(config, llama, text_corpus, tmp_path / "teacher")
    losses = [line["loss"] for line in read_jsonl(tmp_path / "teacher" / "history.jsonl")]
    assert losses[-1] < 0.7 * losses[0]


def shared_rows(speech: SpeechModel, corpus: Path, share: bool) -> list[TrainingSequence]:
    """Two texts of each of two segments, with the prompt longer than any window."""
    segments = read_corpus(corpus).split("train")[:2]
    rows = [
        Row(each.id, "de", text, "teacher")
        for each in segments
        for text in ("die Datei öffnen", "das alte Menü")
    ]
    return build_sequences(speech, segments, rows, share)


@pytest.mark.parametrize("model_type", TYPES)
def test_shared_branches_lose_what_single_rows_lose(
    model_type: str, text_models: dict[str, Path], text_corpus: Path
) -> None:
    speech = load_model(text_models[model_type])

    def loss(share: bool) -> float:
        sequences = shared_rows(speech, text_corpus, share)
        batch = collate(sequences, [0] * len(sequences))
        assert (batch.mask is not None) == share
        return float(sequence_loss(speech, batch, torch.empty(0, 0)).detach())

    assert loss(True) == pytest.approx(loss(False), rel=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_shared_branches_see_nothing_that_is_later_or_of_another(
    model_type: str, text_models: dict[str, Path], text_corpus: Path
) -> None:
    speech = load_model(text_models[model_type])
    (sequence, _) = shared_rows(speech, text_corpus, True)
    first, second = sequence.branches

    def logits(*branches: Branch) -> torch.Tensor:
        batch = collate([replace(sequence, branches=branches)], [0])
        with torch.inference_mode():
            return target_logits(speech, batch, torch.empty(0, 0))

    def last_word_changed(branch: Branch) -> Branch:
        *before, last, end = branch.target
        return replace(branch, target=(*before, last + 1, end))

    expected = logits(first, second)
    own, whole = len(first.target), len(expected)
    changed = logits(last_word_changed(first), second)
    # The changed word is fed where the first text's end is predicted.
    unmoved = [place for place in range(whole) if place != own - 1]
    torch.testing.assert_close(changed[unmoved], expected[unmoved])
    assert (changed[own - 1] - expected[own - 1]).abs().max() > 1e-3
    changed = logits(first, last_word_changed(second))
    torch.testing.assert_close(changed[:-1], expected[:-1])


def test_packages(text_models: dict[str, Path], text_corpus: Path, tmp_path: Path) -> None:
    texts = [SourceText("open the new file."), SourceText("print")]
    for model_type, tied in (("llama", False), ("qwen2", True)):
        changes: dict[str, Any] = (
            {"attention_bias": False, "mlp_bias": False}
            if model_type == "llama"
            else {"use_sliding_window": False}
        )
        student = make_model(
            tmp_path / model_type, model_type, seed=5, tie_word_embeddings=tied, **changes
        )
        wanted = TorchTranslator(load_model(student)).translate(texts, "de", limits=[12, 12])
        for target, precision in (("onnx", "fp32"), ("checkpoint", "fp32"), ("checkpoint", "nf4")):
            out = tmp_path / f"{model_type}-{target}-{precision}"
            config = PackageConfig(target=target, precision=precision, langs=("de",), max_drop=100)
            made = run_package(config, student, text_corpus, out)
            assert made.extra["parity_passed"]
            translator = open_translator(out, dtype="float32")
            found = translator.translate(texts, "de", limits=[12, 12])
            if precision == "fp32":
                assert [row.tokens for row in found] == [row.tokens for row in wanted]
            assert translator.languages == ("de",)
            translator.close()
    for refused in ("gemma2", "cohere", "mistral"):
        config = PackageConfig(target="onnx", precision="fp32", langs=("de",))
        with pytest.raises(FamilyError, match="--target checkpoint"):
            run_package(config, text_models[refused], None, tmp_path / refused)


def test_importance_quality_and_translate(
    llama: Path, text_corpus: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ImportanceConfig(remove=1, lang="de", segments=3)
    run_importance(config, llama, text_corpus, tmp_path / "importance")
    plan = json.loads((tmp_path / "importance" / "plan.json").read_text())
    assert plan["metric"] == "chrf++"
    segments = read_corpus(text_corpus).split("select", "de", 3)
    assert plan["max_new_tokens"] == {each.id: text_limit(each.source_text) for each in segments}
    run_prune(PruneConfig(), llama, tmp_path / "importance" / "plan.json", tmp_path / "pruned")
    quality = QualityConfig(lang="de", resamples=100)
    run_quality(quality, llama, [tmp_path / "pruned"], text_corpus, tmp_path / "quality")
    result = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert set(result["teacher"]["controls"]) == {"shuffled_text"}
    assert result["students"][0]["decoder_layers"] == 5
    lines = tmp_path / "lines.txt"
    lines.write_text("open the file.\n\nclose\rthe menu\n", encoding="utf8", newline="")
    arguments = ["translate", "--model", str(llama), "--lang", "de"]
    said = []
    for given in ([str(lines)], ["-"], []):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.read_bytes())))
        with pytest.raises(SystemExit) as end:
            main([*arguments, *given])
        assert end.value.code == 0
        said.append(capsys.readouterr().out.split("\n"))
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 4 and said[0][1] == ""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--segments", str(lines)])
    assert end.value.code == 2
    assert "reads text, and --segments names audio" in capsys.readouterr().err


def test_a_card_s_prompt_leaves_room_for_text_and_its_language(llama: Path) -> None:
    asked = "Translate the following text from {source language} to German:\n{text}\n"
    assert asked in _prompt(llama, "de")


def test_audio_and_text_are_told_apart(
    llama: Path, tiny_model: Path, tiny_corpus: Path, text_corpus: Path, tmp_path: Path
) -> None:
    config = ImportanceConfig(remove=1, lang="de", method="loss", segments=2)
    with pytest.raises(CorpusError, match="has no audio"):
        run_importance(config, tiny_model, text_corpus, tmp_path / "no-audio")
    # A corpus of speech has transcripts, which a text model can read.
    run_importance(config, llama, tiny_corpus, tmp_path / "transcripts")
    from serve.service import open_model
    from serve.settings import ServeSettings

    with pytest.raises(InputError, match="takes audio"):
        open_model(str(llama), ServeSettings(models=(str(llama),)))


def test_plain_text_is_imported(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, count in (("train", 5), ("dev", 3), ("tst2024", 2)):
        for code, words in (("en", tiny.WORDS), ("de", tiny.GERMAN)):
            lines = [f"{words[index]} {name}" for index in range(count)]
            (source / f"{name}.{code}").write_text("\n".join(lines) + "\n", encoding="utf8")
    made = run_corpus(CorpusConfig(format="text"), source, tmp_path / "corpus")
    assert made.extra["segments"] == {"select": 3, "test": 2, "train": 5}
    first = read_corpus(made.path).split("train")[0]
    assert (first.source_text, first.references, first.audio) == (
        "open train",
        {"de": "öffnen train"},
        "",
    )
    assert not (made.path / "audio").exists()
    (source / "dev.de").write_text("eins\n", encoding="utf8")
    with pytest.raises(CorpusError, match="1 faults") as caught:
        run_corpus(CorpusConfig(format="text"), source, tmp_path / "bad")
    assert "dev.de: 1 lines, dev.en has 3" in str(caught.value)


def test_a_table_without_audio_is_imported(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    rows = [
        f"{tiny.WORDS[i]}\t{tiny.GERMAN[i]}\t{('train', 'dev', 'test')[i % 3]}" for i in range(9)
    ]
    table.write_text("\n".join(["en\tde\tsplit", *rows]) + "\n", encoding="utf8")
    made = run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "corpus")
    assert made.extra["segments"] == {"select": 3, "test": 3, "train": 3}
    assert read_corpus(made.path).segments[0].source_text == "open"
    table.write_text("\n".join(["en\tde\tsplit", *rows, "\tnichts\ttrain"]) + "\n", encoding="utf8")
    with pytest.raises(HalveError, match="1 faults") as caught:
        run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "bad")
    assert "neither audio nor source text" in str(caught.value)
