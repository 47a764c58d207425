"""Which of several files, columns and groups an importer takes: what is ambiguous is said, not guessed."""

import json
from pathlib import Path

import pytest

from halve.corpus import read_corpus
from halve.errors import CorpusError
from halve.importers import CorpusConfig, read_source, run_corpus
from halve.importers.base import Row, known_language
from halve.importers.hf import import_hf
from halve.importers.splits import divide
from tests.importing import Heard, faults_of, sound, text

IWSLT = CorpusConfig(format="iwslt")


def flat_set(folder: Path, name: str, *langs: str) -> None:
    """A segments YAML of two segments with its texts beside it."""
    sound(folder / f"{name}.wav", 3.0)
    entries = [{"wav": f"{name}.wav", "offset": i, "duration": 1.0} for i in range(2)]
    text(folder / f"{name}.yaml", json.dumps(entries))
    for lang in langs:
        text(folder / f"{name}.{lang}", *(f"{name} {lang} {i}" for i in range(2)))


def test_a_set_takes_the_text_of_its_own_name(tmp_path: Path) -> None:
    for name in ("dev", "train"):
        flat_set(tmp_path, name, "en", "de")
    rows = read_source(IWSLT, tmp_path / "train.yaml").rows
    assert [row.references["de"] for row in rows] == ["train de 0", "train de 1"]
    assert rows[0].source_text == "train en 0"
    # Also where other forms of it come first in the alphabet.
    lone = tmp_path / "lone"
    flat_set(lone, "train", "de", "asr.en", "bpe.de", "en")
    rows = read_source(IWSLT, lone).rows
    assert (rows[0].source_text, rows[0].references["de"]) == ("train en 0", "train de 0")


def test_a_lone_set_in_a_folder_of_texts(tmp_path: Path) -> None:
    flat_set(tmp_path / "txt", "segments", "en")
    text(tmp_path / "txt" / "talk.de", "eins", "zwei")
    for source in (tmp_path, tmp_path / "txt" / "segments.yaml"):
        rows = read_source(IWSLT, source).rows
        assert (rows[1].source_text, rows[1].references["de"]) == ("segments en 1", "zwei")


def test_a_text_of_another_name_is_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    flat_set(tmp_path, "segments")
    text(tmp_path / "talk.de", "eins", "zwei")
    rows = read_source(IWSLT, tmp_path / "segments.yaml").rows
    assert [row.references["de"] for row in rows] == ["eins", "zwei"]
    text(tmp_path / "talk.bpe.de", "ei@@ ns", "zwei")
    with pytest.raises(CorpusError, match=r"has 2 texts in de: .*talk\.bpe\.de, .*talk\.de"):
        read_source(IWSLT, tmp_path / "segments.yaml")
    # Another set's text is not this one's.
    (tmp_path / "talk.bpe.de").unlink()
    (tmp_path / "talk.de").unlink()
    flat_set(tmp_path, "dev", "de")
    with pytest.raises(CorpusError, match="No translations"):
        read_source(IWSLT, tmp_path / "segments.yaml")


def test_a_set_without_the_translations_of_others_is_left_aside(tmp_path: Path) -> None:
    flat_set(tmp_path / "a", "tst2022", "en", "de")
    flat_set(tmp_path / "b", "tst2023", "en")
    flat_set(tmp_path / "c", "train", "en", "zh")
    found = read_source(CorpusConfig(format="iwslt", lang=("de",)), tmp_path)
    assert {row.id for row in found.rows} == {"tst2022-00001", "tst2022-00002"}
    assert len([line for line in found.warnings if "no text into de beside it" in line]) == 2
    both = read_source(CorpusConfig(format="iwslt", lang=("de", "zh")), tmp_path).rows
    assert {tuple(row.references) for row in both} == {("de",), ("zh",)}


def test_splits_of_some_segments_are_not_dealt_out_anew(tmp_path: Path) -> None:
    folder = tmp_path / "wmt"
    for name, count in (("train", 30), ("podcast", 5)):
        for lang in ("en", "de"):
            text(folder / f"{name}.{lang}", *(f"{lang} {name} {i}" for i in range(count)))
    config = CorpusConfig(format="text")
    assert "5 segments without a split" in faults_of(config, folder, tmp_path / "c")
    # Dealt out anew on request: by line, not a whole file one way.
    made = run_corpus(CorpusConfig(format="text", split="group"), folder, tmp_path / "d")
    counts = made.extra["segments"]
    assert counts["train"] > counts["select"] > 1 < counts["test"]


def test_the_tests_of_wmt_are_tests(tmp_path: Path) -> None:
    folder = tmp_path / "wmt"
    for name in ("train", "newsdev2019", "newstest2020"):
        for lang in ("en", "de"):
            text(folder / f"{name}.{lang}", *(f"{lang} {name} {i}" for i in range(3)))
    found = read_source(CorpusConfig(format="text"), folder).rows
    splits = {row.id.split("-")[0]: row.split for row in found}
    assert splits == {"train": "train", "newsdev2019": "select", "newstest2020": "test"}


@pytest.mark.parametrize(
    ("written", "code"),
    [("de", "de"), ("de-AT", "de"), ("zh_Hans", "zh"), ("de_asr", None), ("de_tok", None)],
)
def test_a_region_is_no_other_language(written: str, code: str | None) -> None:
    assert known_language(written) == code


def test_a_text_without_a_partner_is_left_aside_and_told(tmp_path: Path) -> None:
    for name in ("train.en", "train.de", "more.en"):
        text(tmp_path / name, f"a line of {name}")
    found = read_source(CorpusConfig(format="text"), tmp_path)
    assert len(found.rows) == 1
    assert any("more.* is left aside: more.en alone" in line for line in found.warnings)


def test_two_texts_of_one_language(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    for lang in ("en", "de", "de-AT"):
        text(folder / f"train.{lang}", f"{lang} text")
    rows = read_source(CorpusConfig(format="text"), folder).rows
    assert rows[0].references == {"de": "de text"}
    for lang in ("zh-CN", "zh-TW"):
        text(folder / f"train.{lang}", f"{lang} text")
    with pytest.raises(CorpusError, match="all of them Chinese"):
        read_source(CorpusConfig(format="text"), folder)
    rows = read_source(CorpusConfig(format="text", lang=("de",)), folder).rows
    assert rows[0].references == {"de": "de text"}, "nobody asked for Chinese"


def test_a_table_s_columns_may_name_a_region(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    table = text(tmp_path / "t.tsv", "audio\ttext\tde-DE\tzh-CN", "a.wav\thi\thallo\t你好")
    rows = read_source(CorpusConfig(format="tsv"), table).rows
    assert rows[0].references == {"de": "hallo", "zh": "你好"}


def test_a_data_set_alone_names_no_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [
        {
            "audio": str(sound(tmp_path / f"{i}.wav")),
            "text_de": f"wort {i}",
            "text_de_asr": "falsch",
        }
        for i in range(12)
    ]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "set"))
    config = CorpusConfig(format="hf")
    found = import_hf(str(tmp_path / "set"), config)
    assert {row.split for row in found.rows} == {None}
    assert found.rows[0].references == {"de": "wort 0"}
    made = run_corpus(config, tmp_path / "set", tmp_path / "c")
    assert set(made.extra["segments"]) == {"train", "select", "test"}
    one = CorpusConfig(format="hf", text_column="text_de")
    with pytest.raises(CorpusError, match="names one column"):
        import_hf(str(tmp_path / "set"), one)


def test_a_large_group_is_left_to_train() -> None:
    sizes = {"anna": 90, "ben": 5, "cara": 5}
    for seed in range(8):
        rows = [
            Row("x", f"{name}{i}", None, "t", {"de": "t"}, group=name)
            for name, count in sizes.items()
            for i in range(count)
        ]
        config = CorpusConfig(format="tsv", split="group", seed=seed)
        assert {row.split for row in divide(rows, config) if row.group == "anna"} == {"train"}


def test_a_recording_is_told_by_its_path(tmp_path: Path) -> None:
    lines = ["audio\tde\tsplit"]
    for name, split in (("anna", "train"), ("ben", "select"), ("cara", "test")):
        sound(tmp_path / name / "audio.wav")
        lines += [f"{name}/audio.wav\t{name} sagt\t{split}"]
    table = text(tmp_path / "t.tsv", *lines)
    made = run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "c")
    groups = {segment.group for segment in read_corpus(made.path).segments}
    assert groups == {"anna/audio.wav", "ben/audio.wav", "cara/audio.wav"}


def test_sentences_said_twice_are_kept_if_asked(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    for name in ("train", "dev", "test"):
        text(folder / f"{name}.en", "Thank you.", "Thank you.")
        text(folder / f"{name}.de", "Danke.", "Danke.")
    made = run_corpus(CorpusConfig(format="text", duplicates="keep"), folder, tmp_path / "c")
    assert made.extra["segments"] == {"train": 2, "select": 2, "test": 2}
    assert "same text as" in faults_of(CorpusConfig(format="text"), folder, tmp_path / "d")


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    for lang in ("en", "de"):
        text(folder / f"train.{lang}", *(f"{lang} {i}" for i in range(3)))
    heard = Heard()
    run_corpus(CorpusConfig(format="text"), folder, tmp_path / "c", heard)
    assert any("No segment is in select or test" in line for line in heard.warnings)
    heard = Heard()
    config = CorpusConfig(format="text", split="segment", select_share=0)
    run_corpus(config, folder, tmp_path / "d", heard)
    assert not [line for line in heard.warnings if "No segment" in line], "it was asked for"


def test_untranslated_speech_is_kept_for_train_alone(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav", 9.0)
    lines = [
        "audio\toffset\tduration\tde\tsplit\tgroup",
        "a.wav\t0\t1\t\ttrain\tg",
        "a.wav\t1\t1\tzwei\ttrain\tg",
        "a.wav\t2\t1\t \ttrain\tg",
        "a.wav\t3\t1\tvier\tselect\th",
        "a.wav\t4\t1\tfünf\ttest\ti",
    ]
    table = text(tmp_path / "source" / "table.tsv", *lines)
    keep = CorpusConfig(format="tsv", untranslated="keep")
    made = run_corpus(keep, table, tmp_path / "corpus")
    references = [segment.references for segment in read_corpus(made.path).segments]
    assert references == [{}, {"de": "zwei"}, {}, {"de": "vier"}, {"de": "fünf"}]
    again = run_corpus(CorpusConfig(format="halve", untranslated="keep"), made.path, tmp_path / "b")
    assert [each.references for each in read_corpus(again.path).segments] == references
    assert (
        faults_of(CorpusConfig(format="halve"), made.path, tmp_path / "c").count("no transl") == 2
    )
    assert "table.tsv:2: the de text is empty" in faults_of(
        CorpusConfig(format="tsv"), table, tmp_path / "c"
    )
    text(table, *(line.replace("fünf", "") for line in lines))
    assert "1 faults" in faults_of(keep, table, tmp_path / "c")


@pytest.mark.parametrize("named", [True, False])
def test_untranslated_speech_is_never_dealt_to_select_or_test(tmp_path: Path, named: bool) -> None:
    sound(tmp_path / "source" / "a.wav", 30.0)
    lines = ["audio\toffset\tduration\tde\tgroup" + "\tsplit" * named]
    for place in range(20):
        said = f"Satz {place}" if place % 2 else ""
        lines.append(
            f"a.wav\t{place}\t1\t{said}\tg{place // 4 if place < 4 else place}" + "\ttrain" * named
        )
    table = text(tmp_path / "source" / "table.tsv", *lines)
    config = CorpusConfig(
        format="tsv", untranslated="keep", split="group" if named else None, select_share=0.3
    )
    segments = read_corpus(run_corpus(config, table, tmp_path / "corpus").path).segments
    assert len(segments) == 20
    assert {each.split for each in segments if not each.references} == {"train"}
    assert {each.split for each in segments if each.references} == {"train", "select", "test"}
    assert {each.split for each in segments if each.group == "g0"} == {"train"}, "whole groups"
    again = run_corpus(config.model_copy(update={"split": "segment"}), table, tmp_path / "alone")
    alone = read_corpus(again.path).segments
    assert {each.split for each in alone if not each.references} == {"train"}


def test_untranslated_speech_that_is_held_out_is_left_out(tmp_path: Path) -> None:
    for name in "ab":
        sound(tmp_path / "source" / f"{name}.wav", 9.0)
    table = text(
        tmp_path / "source" / "table.tsv",
        "id\taudio\toffset\tduration\ttext\tde\tsplit\tgroup",
        "overlaps\ta.wav\t0.5\t0.7\t\t\ttrain\tg",
        "beside\ta.wav\t1.1\t0.2\t\t\ttrain\tg",
        "after\ta.wav\t2\t1\t\t\ttrain\tg",
        "held too\ta.wav\t1.3\t0.2\tThen.\tDann.\ttest\th",
        "same words\tb.wav\t0\t1\tThank  you ALL.\t\ttrain\tg",
        "translated\tb.wav\t1\t1\tThank you all.\tDanke schön.\ttrain\tg",
        "held\ta.wav\t0\t1\tThank you all.\tDanke.\ttest\th",
        "chosen\tb.wav\t4\t1\tFour.\tVier.\tselect\ti",
    )
    heard = Heard()
    config = CorpusConfig(format="tsv", untranslated="keep")
    made = run_corpus(config, table, tmp_path / "corpus", heard)
    kept = [each.id for each in read_corpus(made.path).segments]
    assert kept == ["beside", "after", "held too", "translated", "held", "chosen"]
    assert any("2 untranslated segments are also in" in told for told in heard.warnings)
    dropped = json.loads((made.path / "dropped.json").read_text())["faults"]
    assert [line.split(";")[0] for line in dropped] == [
        "overlaps: also in test, as held",
        "same words: also in test, as held",
    ]
