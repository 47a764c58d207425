"""The demo corpus: how its text is found, cleaned and split, and that the committed part holds."""

import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from demo.build_corpus import COMMITTED, COMMITTED_SIZES, choose_committed
from demo.ogg import encode
from demo.splits import ngrams, split_triples, too_alike
from demo.triples import (
    UNSPEAKABLE,
    Triple,
    can_be_spoken,
    page_paragraphs,
    page_triples,
    split_sentences,
    spoken_form,
    tidy,
)
from demo.voices import VOICES, Voice, choose_voice
from halve.artefact import verify
from halve.audio import decode_audio, pcm_sha256
from halve.corpus import Corpus, Segment, check_segments, read_corpus

GERMAN, CHINESE = "Wählen Sie eine Zelle im Blatt aus.", "选择工作表中的一个单元格。"


@pytest.fixture(scope="module")
def committed() -> Corpus:
    return read_corpus(COMMITTED)


def page(*paragraphs: str) -> str:
    return "".join(f'<p id="par_{n}">{text}</p>' for n, text in enumerate(paragraphs, 1))


def triple(number: int, en: str, page: str) -> Triple:
    return Triple(f"{page}#{number}", page, en, f"Satz {page} {number}", f"句子 {page} {number}")


def as_triples(segments: list[Segment]) -> list[Triple]:
    return [
        Triple(s.id, s.group, s.source_text, s.references["de"], s.references["zh"])
        for s in segments
    ]


# --- text --------------------------------------------------------------------------------------


def test_page_paragraphs_keeps_what_a_reader_sees() -> None:
    html = (
        '<h1 id="hd_1"><a name="x"></a>Adding Cells</h1>'
        '<p id="par_1">Press <span hidden="true" class="MAC">Command</span>'
        '<span hidden="true" id="default1"><span class="keycode">Ctrl</span></span> now.</p>'
        '<p id="par_2">Type <code>x=1</code>.</p><p>no id</p>'
        '<div class="notetext"><p>A note.</p></div>'
        '<p class="code" id="par_3">Sub Main</p>'
    )
    assert page_paragraphs(html) == {
        ("hd_1", 0): "Adding Cells",
        ("par_1", 0): "Press Ctrl now.",
        ("par_2", 0): f"Type {UNSPEAKABLE}x=1.",
        ("note", 0): "A note.",
    }


def test_page_triples_aligns_by_id_and_skips_unequal_counts() -> None:
    html = {
        "en": page(
            "Select a cell in the sheet. Press the key at once.", "One here. Two are there."
        ),
        "de": page(f"{GERMAN} Drücken Sie sofort die Taste.", "Nur ein Satz steht hier."),
        "zh": page(f"{CHINESE}立即按下该按键。", "这里一个。那里两个。"),
    }
    found = list(page_triples("scalc/01/x", html))
    assert [found_triple.en for found_triple in found] == [
        "Select a cell in the sheet.",
        "Press the key at once.",
    ]
    assert found[0].de == GERMAN
    assert found[0].zh == CHINESE


def test_sentences_do_not_end_at_abbreviations() -> None:
    assert split_sentences("Use a form, e.g. A list. Then stop.", "en") == [
        "Use a form, e.g. A list.",
        "Then stop.",
    ]
    assert split_sentences("单击。然后停止。", "zh") == ["单击。", "然后停止。"]


def test_tidy_removes_what_nobody_hears() -> None:
    assert tidy("Select “Find & Replace...” .", "en") == "Select Find and Replace."
    assert tidy("选择「编辑」 对话框,然后 继续。", "zh") == "选择编辑对话框，然后继续。"


@pytest.mark.parametrize(
    "english",
    [
        "Choose Tools - Options in the menu.",
        "Returns the SUMPRODUCT of two ranges.",
        "Enter x=1 in the field.",
        "See www.example.org for the rest.",
        "The file settings.xml is read first.",
        "Two words",
        "Set 1 to 2 and 3 in it.",
        "Use the myVariableName property of it.",
        "Set the image background of the.",
        f"Click {UNSPEAKABLE} in the toolbar.",
    ],
)
def test_unspeakable_sentences_are_refused(english: str) -> None:
    assert not can_be_spoken(english, GERMAN, CHINESE)


def test_translations_must_answer_to_the_english() -> None:
    english = "Select a cell in the sheet."
    assert can_be_spoken(english, GERMAN, CHINESE)
    assert not can_be_spoken(english, english, CHINESE)
    assert not can_be_spoken(english, "Zelle 7 im Blatt auswählen.", CHINESE)
    assert not can_be_spoken(english, GERMAN, english)


def test_spoken_form_reads_names_and_keys_in_their_parts() -> None:
    assert spoken_form("Press F5 in LibreOffice, e.g. Ctrl.") == (
        "Press F 5 in Libre Office, for example control."
    )


# --- splits ------------------------------------------------------------------------------------


def test_too_alike_finds_runs_ratios_and_equal_translations() -> None:
    others = [
        triple(0, "one two three four five six seven eight at the end of it all", "a"),
        triple(1, "Deletes the selected page style.", "a"),
        Triple("x", "a", "Quite another sentence stands here.", "gleich", "别的"),
    ]
    held_out = [
        triple(0, "We saw one two three four five six seven eight", "b"),
        triple(1, "Deletes the selected paragraph style.", "b"),
        Triple("y", "b", "Nothing like any of these texts.", "gleich", "其他"),
        triple(3, "Formulas are shown in the bar.", "b"),
    ]
    assert too_alike(held_out, others) == [{0}, {1}, {2}, set()]


def test_split_triples_is_by_page_deterministic_and_free_of_near_duplicates() -> None:
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(list("abcdefghijklmnop"), 7)) for _ in range(400)]
    triples = [
        triple(number, " ".join(rng.choice(vocabulary, 9)), f"page{number % 40}")
        for number in range(400)
    ]
    splits = split_triples(triples, seed=3, select_size=10, test_size=40)
    assert splits == split_triples(triples, seed=3, select_size=10, test_size=40)
    assert len(splits.select) == 10
    assert len(splits.test) == 40
    pages = [{t.page for t in part} for part in (splits.select, splits.test, splits.train)]
    assert sum(map(len, pages)) == len(set.union(*pages))
    assert not any(too_alike(splits.test, splits.train))
    assert not any(too_alike(splits.select, splits.train))


# --- speech ------------------------------------------------------------------------------------


def test_voices_are_drawn_by_id_and_some_are_heard_in_test_alone() -> None:
    def names(split: str) -> set[str]:
        return {choose_voice(f"{split}-{n}", split, 0).name for n in range(600)}

    unseen = {voice.name for voice in VOICES if voice.train_weight == 0}
    assert {voice.engine for voice in VOICES if voice.name in unseen} == {"flite", "espeak-ng"}
    assert names("train") == {voice.name for voice in VOICES} - unseen
    assert names("test") == {voice.name for voice in VOICES}
    assert choose_voice("a", "test", 1) == choose_voice("a", "test", 1)
    assert sum(voice.train_weight for voice in VOICES) == pytest.approx(1.0)


@pytest.mark.skipif(shutil.which("opusenc") is None, reason="needs opus-tools")
def test_encoding_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    samples = (np.sin(np.arange(16000) / 20) / 4).astype(np.float32)
    stream = encode(samples, "train-00001")
    assert stream == encode(samples, "train-00001")
    assert stream != encode(samples, "train-00002")
    (tmp_path / "a.opus").write_bytes(stream)
    with (tmp_path / "a.opus").open("rb") as file:
        assert len(decode_audio(file)) == 16000


def test_choose_committed_takes_every_voice() -> None:
    def segment(number: int, split: str, voice: Voice) -> Segment:
        extra = {"voice": voice.name}
        name = f"{split}-{number}"
        return Segment(name, name, 0.0, 9.0 * (number % 2), "en", "", {}, split, "", extra)

    segments = [
        segment(number, split, VOICES[number // 2 % len(VOICES)])
        for split in ("select", "test", "train")
        for number in range(120 if split == "select" else 900)
    ]
    chosen = choose_committed(segments)
    assert Counter(s.split for s in chosen) == COMMITTED_SIZES
    assert {s.extra["voice"] for s in chosen if s.split == "test"} == {v.name for v in VOICES}
    assert all(s.duration_s <= 8 for s in chosen if s.split != "select")


# --- the committed part ------------------------------------------------------------------------


def test_committed_corpus_is_whole_and_of_the_stated_size(committed: Corpus) -> None:
    assert Counter(segment.split for segment in committed.segments) == COMMITTED_SIZES
    assert verify(COMMITTED) == []
    assert check_segments(committed.path, committed.segments, max_audio_s=30.0) == []
    files = [file for file in COMMITTED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000


def test_committed_groups_stay_in_one_split(committed: Corpus) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for segment in committed.segments:
        splits[segment.group].add(segment.split)
    assert all(len(found) == 1 for found in splits.values())


def test_committed_test_and_select_have_no_near_duplicate_in_train(committed: Corpus) -> None:
    train = committed.split("train")
    runs = set().union(*(ngrams(segment.source_text) for segment in train))
    held_out = committed.split("test") + committed.split("select")
    assert not any(ngrams(segment.source_text) & runs for segment in held_out)
    assert not any(too_alike(as_triples(held_out), as_triples(train)))


def test_committed_voices(committed: Corpus) -> None:
    by_split: dict[str, set[str]] = defaultdict(set)
    for segment in committed.segments:
        by_split[segment.split].add(segment.extra["voice"])
    assert len(by_split["train"]) >= 8
    assert len(by_split["test"] - by_split["train"] - by_split["select"]) >= 2


def test_committed_audio_decodes_to_the_recorded_pcm(committed: Corpus) -> None:
    for segment in committed.segments[::62]:
        samples = committed.audio(segment)
        assert len(samples) == round(segment.duration_s * 16000)
        assert pcm_sha256(samples) == segment.extra["pcm_sha256"]
