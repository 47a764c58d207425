"""Distillation: what is kept, what is dropped and why, and a killed run ends the same."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from compress import distill
from compress.config import DistillConfig
from compress.distill import drop_reason, repeats_itself, run_distill, write_rows
from compress.rows import reference_rows, segments_for
from halve import artefact
from halve.corpus import read_corpus, write_manifest
from halve.errors import CorpusError
from halve.json_files import read_jsonl
from halve.models import load_model
from halve.translate import TorchTranslator, Translation
from tests.compress import kills
from tests.importing import Heard

REFERENCE = "Öffnen Sie die Datei und drucken Sie die Seite."
CONFIG = DistillConfig(langs=("de",))


@pytest.mark.parametrize(
    ("text", "stopped", "reason"),
    [
        ("", "end", "empty"),
        ("  ", "end", "empty"),
        ("Öffnen Sie die Datei, drucken Sie die Seiten.", "end", None),
        ("Öffnen Sie die Datei", "limit", "looping"),
        ("Öffnen Sie die Datei", "loop", "looping"),
        (REFERENCE, "end", "duplicate"),
        (" " + REFERENCE, "end", "duplicate"),
        (" ".join([REFERENCE, REFERENCE, REFERENCE]), "end", "too long"),
        ("Datei", "end", "too short"),
        ("Hjk Wqx, vvv bbb zzz ppp ooo jjj yyy mm.", "end", "wrong"),
    ],
)
def test_each_drop_has_its_reason(text: str, stopped: str, reason: str | None) -> None:
    translation = Translation(text, list(range(30)), stopped)
    assert drop_reason(CONFIG, translation, REFERENCE, "de") == reason


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([], False),
        ([5] * 4, False),
        ([1, 2, *[5] * 12, 3], True),
        ([*range(40)], False),
        ([9, 8, *[1, 2, 3, 4] * 4, 7], True),
        ([9, 8, *[1, 2, 3, 4] * 3, 7], False),
    ],
)
def test_repetition_is_found_anywhere(tokens: list[int], looping: bool) -> None:
    assert repeats_itself(tokens) is looping


def test_translations_join_the_references(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = DistillConfig(langs=("de", "zh"), batch_size=5, min_score=0.0)
    done = run_distill(config, tiny_model, tiny_corpus, tmp_path / "translations")
    assert not artefact.verify(done.path)
    translations, rows, dropped = (
        read_jsonl(done.path / f"{name}.jsonl") for name in ("translations", "rows", "dropped")
    )
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("train")
    expected = [(segment.id, lang) for segment in segments for lang in ("de", "zh")]
    assert [(row["id"], row["lang"]) for row in translations] == expected
    references = [row for row in rows if row["origin"] == "reference"]
    assert [row["text"] for row in references if row["lang"] == "zh"] == corpus.references(
        segments, "zh"
    )
    taught = [row for row in rows if row["origin"] == "teacher"]
    assert len(taught) + len(dropped) == len(translations)
    assert sum(done.extra["dropped"].values()) == len(dropped)
    translator = TorchTranslator(load_model(tiny_model, device="cpu"), stop_loops=True)
    alone = translator.translate([corpus.audio(segments[3])], "de")[0]
    assert translations[6]["tokens"] == alone.tokens
    assert translations[6]["stopped"] == alone.stopped


def test_a_language_without_references_is_refused(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match="no train segment with a fr reference"):
        run_distill(DistillConfig(langs=("fr",)), tiny_model, tiny_corpus, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _without_references(corpus: Path, out: Path, ids: set[str]) -> Path:
    """A copy of a corpus in which these segments are untranslated."""
    shutil.copytree(corpus, out)
    segments = [
        replace(each, references={}) if each.id in ids else each
        for each in read_corpus(corpus).segments
    ]
    write_manifest(out, segments)
    return out


def test_untranslated_speech_teaches_what_the_teacher_says(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    train = read_corpus(tiny_corpus).split("train")
    plain = {each.id for each in train[::2]}
    corpus = _without_references(tiny_corpus, tmp_path / "corpus", plain)
    config = DistillConfig(langs=("de",), untranslated=True, min_score=0.0, logits=2)
    made = run_distill(config, tiny_model, corpus, tmp_path / "all")
    translations, rows, dropped = (
        read_jsonl(made.path / f"{name}.jsonl") for name in ("translations", "rows", "dropped")
    )
    assert [line["id"] for line in translations] == [each.id for each in train]
    assert {row["id"] for row in rows if row["origin"] == "reference"}.isdisjoint(plain)
    told = {line["id"]: line["text"] for line in translations}
    of_plain = {row["id"]: row["text"] for row in rows if row["id"] in plain}
    left = {line["id"]: line["reason"] for line in dropped if line["id"] in plain}
    assert of_plain.keys() | left.keys() == plain and set(left.values()) <= {"looping", "empty"}
    assert of_plain == {name: told[name] for name in of_plain}

    config = DistillConfig(langs=("de",), min_score=0.0)
    heard = Heard()
    fewer = run_distill(config, tiny_model, corpus, tmp_path / "fewer", heard)
    found = read_jsonl(fewer.path / "translations.jsonl")
    assert [line["id"] for line in found] == [each.id for each in train if each.id not in plain]
    assert any(f"{len(plain)} segments without a reference" in told for told in heard.messages)


def test_speech_in_the_wanted_language_is_not_translated(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    first, second = read_corpus(tiny_corpus).split("train")[:2]
    german = replace(first, source_lang="de", references={})
    config = DistillConfig(langs=("de", "zh"), untranslated=True)
    said = Translation("Drei Wörter hier", [5, 6, 7], "end")
    found = {(german.id, "zh"): [said], (second.id, "de"): [said], (second.id, "zh"): [said]}
    write_rows(config, [german, replace(second, references={})], found, tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    wanted = [(german.id, "zh"), (second.id, "de"), (second.id, "zh")]
    assert [(row["id"], row["lang"]) for row in rows] == wanted


def test_a_killed_distill_ends_with_the_same_bytes(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = DistillConfig(langs=("de",), batch_size=2)
    calm, struck = ((run_distill, (config, tiny_model, tiny_corpus, tmp_path / n)) for n in "cs")
    kills.survives(calm, struck, 2, seed=3)
    kills.same_files(tmp_path / "c", tmp_path / "s")


def test_what_becomes_of_translations_needs_no_teacher(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(langs=("de",), batch_size=2, min_score=0.0)
    run_distill(config, tiny_model, tiny_corpus, tmp_path / "t")
    strict = config.model_copy(update={"min_score": 100.0})
    fresh = run_distill(strict, tiny_model, tiny_corpus, tmp_path / "fresh")
    monkeypatch.delattr(distill, "load_model")
    again = run_distill(strict, tiny_model, tiny_corpus, tmp_path / "t")
    assert artefact.identity(again.path) == artefact.identity(fresh.path)
    with monkeypatch.context() as context, pytest.raises(NameError):  # older code's
        context.setattr(artefact, "REVISIONS", {"translations": 99})
        run_distill(config, tiny_model, tiny_corpus, tmp_path / "t")
    with pytest.raises(NameError):  # other translations
        run_distill(strict.model_copy(update={"beams": 2}), tiny_model, tiny_corpus, tmp_path / "t")


def test_unfinished_translations_are_kept_when_only_the_filter_changes(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(langs=("de",), batch_size=2, min_score=0.0)
    fresh = run_distill(config, tiny_model, tiny_corpus, tmp_path / "fresh")
    with monkeypatch.context() as context:
        context.delattr(distill, "write_rows")
        with pytest.raises(NameError):
            run_distill(
                config.model_copy(update={"min_score": 9.0}),
                tiny_model,
                tiny_corpus,
                tmp_path / "t",
            )
    monkeypatch.delattr(distill, "load_model")
    again = run_distill(config, tiny_model, tiny_corpus, tmp_path / "t")
    assert artefact.identity(again.path) == artefact.identity(fresh.path)


def test_several_hypotheses_are_those_of_a_beam_search(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = DistillConfig(langs=("de",), limit=3, hypotheses=3, min_score=0.0)
    done = run_distill(config, tiny_model, tiny_corpus, tmp_path / "translations")
    lines = read_jsonl(done.path / "translations.jsonl")
    corpus = read_corpus(tiny_corpus)
    translator = TorchTranslator(load_model(tiny_model, device="cpu"), stop_loops=True)
    for segment in segments_for(corpus, "train", ["de"], 3):
        found = [line["tokens"] for line in lines if line["id"] == segment.id]
        assert len(found) == 3 and len({tuple(tokens) for tokens in found}) == 3
        assert found[0] == translator.translate([corpus.audio(segment)], "de", beams=3)[0].tokens
    rows, dropped = (read_jsonl(done.path / f"{name}.jsonl") for name in ("rows", "dropped"))
    assert len(rows) + len(dropped) == 3 + len(lines)


def test_the_best_of_a_wider_search(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    found = {}
    for name, chosen in (("all", {"hypotheses": 3}), ("best", {"beams": 3, "batch_size": 5})):
        config = DistillConfig(langs=("de",), limit=5, min_score=0.0, **chosen)
        done = run_distill(config, tiny_model, tiny_corpus, tmp_path / name)
        found[name] = read_jsonl(done.path / "translations.jsonl")
    assert found["best"] == found["all"]


def test_parts_of_a_batch_say_what_a_batch_says(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name, most in (("whole", 99), ("parts", 2)):
        monkeypatch.setattr(
            distill, "rows_that_fit", lambda speech, longest, rows, m=most: min(rows, m)
        )
        config = DistillConfig(langs=("de", "zh"), batch_size=7, min_score=0.0)
        done = run_distill(config, tiny_model, tiny_corpus, tmp_path / name)
        found[name] = read_jsonl(done.path / "translations.jsonl")
    assert found["parts"] == found["whole"]


def test_the_next_best_takes_the_place_of_a_dropped_one(tiny_corpus: Path, tmp_path: Path) -> None:
    segment = read_corpus(tiny_corpus).split("train")[0]
    reference = segment.references["de"]
    beams = [
        Translation(reference, [1], "loop"),
        Translation(f"{reference} A", [2], "end"),
        Translation(f"{reference} B", [3], "end"),
    ]
    config = DistillConfig(langs=("de",), beams=3)
    counts = write_rows(config, [segment], {(segment.id, "de"): beams}, tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert [row["text"] for row in rows] == [reference, f"{reference} A"]
    assert (counts["translations"], counts["dropped"]) == (3, {"looping": 1})


def test_no_more_hypotheses_than_beams() -> None:
    with pytest.raises(ValueError, match="3 hypotheses need as many beams, not 2"):
        DistillConfig(langs=("de",), hypotheses=3, beams=2)


def test_an_empty_reference_is_no_row(tiny_corpus: Path, tmp_path: Path) -> None:
    first, second = read_corpus(tiny_corpus).split("train")[:2]
    blank = replace(first, references={"de": " \n"})
    found = {(each.id, "de"): [Translation("", [], "end")] for each in (blank, second)}
    counts = write_rows(CONFIG, [blank, second], found, tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert rows == [row.record() for row in reference_rows([blank, second], ["de"])]
    assert counts["rows"] == len(rows) == 1


def test_a_hypothesis_is_learnt_once(tiny_corpus: Path, tmp_path: Path) -> None:
    segment = read_corpus(tiny_corpus).split("train")[0]
    reference = segment.references["de"]
    texts = [f"{reference} A", reference, f"{reference} B", f" {reference} A"]
    found = [Translation(text, list(range(20)), "end") for text in texts]
    config = DistillConfig(langs=("de",), hypotheses=4)
    counts = write_rows(config, [segment], {(segment.id, "de"): found}, tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert [row["text"] for row in rows] == [reference, f"{reference} A", f"{reference} B"]
    assert [row["origin"] for row in rows] == ["reference", "teacher", "teacher"]
    assert counts["dropped"] == {"duplicate": 2} and counts["translations"] == 4


def test_a_duplicate_leaves_room_for_the_next_beam(tiny_corpus: Path, tmp_path: Path) -> None:
    segment = read_corpus(tiny_corpus).split("train")[0]
    reference = segment.references["de"]
    texts = [f"{reference} A", f"{reference} A ", f"{reference} B", f"{reference} C"]
    beams = [Translation(text, list(range(20)), "end") for text in texts]
    config = DistillConfig(langs=("de",), hypotheses=2, beams=4)
    write_rows(config, [segment], {(segment.id, "de"): beams}, tmp_path)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert [row["text"] for row in rows] == [reference, f"{reference} A", f"{reference} B"]


def test_a_sample_without_a_language_is_refused(tiny_corpus: Path) -> None:
    corpus = read_corpus(tiny_corpus)
    last = corpus.split("train")[-1].id
    rare = [
        each if each.id == last else replace(each, references={"de": each.references["de"]})
        for each in corpus.segments
    ]
    corpus = replace(corpus, segments=tuple(rare))
    assert len(segments_for(corpus, "train", ["de", "zh"], None)) == 12
    with pytest.raises(CorpusError, match="Of 2 train segments none has a zh reference"):
        segments_for(corpus, "train", ["de", "zh"], 2)
