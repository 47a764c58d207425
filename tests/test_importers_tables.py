"""Tables of segments; what holds of every import: faults, audio, a second run."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from halve import artefact, importers
from halve.corpus import read_corpus
from halve.importers import CorpusConfig, read_source, run_corpus
from halve.progress import SILENT
from pipeline import steps
from tests.importing import Heard, faults_of, sound, text


def tsv(tmp_path: Path, *lines: str, header: str = "id\taudio\ttext\tde\tsplit\tgroup") -> Path:
    return text(tmp_path / "source" / "table.tsv", header, *lines)


def test_tsv(tmp_path: Path) -> None:
    for name in "abc":
        sound(tmp_path / "source" / "rec" / f"{name}.flac", 2.0, rate_hz=8_000)
    table = tsv(
        tmp_path,
        'x1\trec/a.flac\tSay "hi"\tSag "hallo"\ttrain\tann\t0.5\t1.0',
        "x2\trec/b.flac\ttwo\tzwei\tdev\tbob\t\t",
        "x3\trec/c.flac\tthree\tdrei\ttest\tcid\t\t",
        header="id\taudio\ttext\tde\tsplit\tspeaker\toffset\tduration",
    )
    made = run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "corpus")
    segments = read_corpus(made.path).segments
    assert [s.split for s in segments] == ["train", "select", "test"]
    assert segments[0].references == {"de": 'Sag "hallo"'}
    assert (segments[0].offset_s, segments[0].duration_s, segments[1].duration_s) == (0.5, 1.0, 2.0)
    assert segments[0].audio == "audio/rec/a.flac"
    # Complete by itself: the source may go.
    for path in (tmp_path / "source").rglob("*.flac"):
        path.unlink()
    assert read_corpus(made.path).audio(segments[1]).shape == (32_000,)


def test_settings_without_effect_are_told(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav")
    table = tsv(tmp_path, "a\ta.wav\tone\teins\ttrain\tg", "b\ta.wav\ttwo\tzwei\ttest\th")
    heard = Heard()
    config = CorpusConfig(format="tsv", test_share=0.3, text_column="said_{lang}")
    run_corpus(config, table, tmp_path / "c", heard)
    assert any("--test-share, --text-column" in warning for warning in heard.warnings)
    again = Heard()
    run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "d", again)
    assert not any("nothing is done" in warning for warning in again.warnings)


def test_a_tsv_has_no_quoting_and_no_longest_cell(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav")
    long = "lang " * 40_000
    table = tsv(tmp_path, f'a\ta.wav\t"open\t{long}\ttrain\tg', f"b\ta.wav\tno\t{long}x\ttrain\tg")
    (first, second) = read_corpus(
        run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "c").path
    ).segments
    assert first.source_text == '"open'
    assert second.references == {"de": f"{long}x"}


def test_a_carriage_return_is_no_end_of_a_line(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav")
    table = tsv(tmp_path, "a\ta.wav\tone\tHallo\rWelt\ttrain\tg", "b\tb.wav\ttwo\tzwei\ttrain\tg")
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "c")
    assert f"{table}:2: a carriage return inside the line" in message
    assert f"{table}:3: " in message
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r"))
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "c")
    assert f"{table}:1: lines end in a carriage return alone" in message


@pytest.mark.parametrize("header", ["audio\tde\tAudio", "audio\tde\t DE "])
def test_a_column_is_there_once(tmp_path: Path, header: str) -> None:
    sound(tmp_path / "source" / "a.wav")
    table = tsv(tmp_path, "a.wav\teins\tb.wav", header=header)
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "c")
    assert f"{table}:1: the header names" in message and "more than once" in message


@pytest.mark.parametrize(
    ("offset", "duration", "fault"),
    [
        ("nan", "nan", "offset 'nan' is no number of seconds"),
        ("0.1", "inf", "duration 'inf' is no number of seconds"),
        ("-1", "0.5", "offset '-1' is no number of seconds"),
        ("0.1", "0.00001", "hold no sample"),
        ("1.01", "0.005", "hold no sample"),
        ("0.1", "0", "make no segment"),
    ],
)
def test_a_stretch_of_a_table_holds_a_sample(
    tmp_path: Path, offset: str, duration: str, fault: str
) -> None:
    sound(tmp_path / "source" / "a.wav")
    table = tsv(
        tmp_path, f"a.wav\teins\t{offset}\t{duration}", header="audio\tde\toffset\tduration"
    )
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "c")
    assert any(
        row.strip().startswith(f"{table}:2: ") and fault in row for row in message.split("\n")
    )


def test_audio_is_heard_to_its_end(tmp_path: Path) -> None:
    """Half a FLAC and samples that are no numbers: named at the import, with all other faults."""
    source = tmp_path / "source"
    half = sound(source / "half.flac", 5.0)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    soundfile.write(source / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    sound(source / "good.wav")
    table = tsv(
        tmp_path,
        "a\thalf.flac\tone\teins\ttrain\tg",
        "b\tnan.wav\ttwo\tzwei\ttrain\tg",
        "c\tgood.wav\tthree\t\ttrain\tg",
        "d\tgood.wav\tfour\tvier\ttrain\tg",
    )
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "c")
    assert f"{table}:2: {half}: damaged or cut short: of 5.00 s" in message
    assert f"{table}:3: {source / 'nan.wav'}: holds samples that are not finite" in message
    assert f"{table}:4: the de text is empty" in message
    heard = Heard()
    config = CorpusConfig(format="tsv", faulty="drop")
    made = run_corpus(config, table, tmp_path / "c", heard)
    assert [s.id for s in read_corpus(made.path).segments] == ["d"]
    assert ("Decoding audio", 3, 3) in heard.tasks


def test_files_and_folders_of_one_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("real", "audio/x/y", "z/w", "audio/z"):
        sound(source / f"{name}.wav").rename(source / name)
    (source / "real").rename(source / "x")
    names = ("x", "audio/x/y", "z/w", "audio/z")
    table = tsv(tmp_path, *(f"{i}\t{name}\ts {i}\tt {i}\ttrain\tg" for i, name in enumerate(names)))
    made = run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "c")
    segments = read_corpus(made.path).segments
    assert [s.audio for s in segments] == ["audio/x", "audio/x-2/y", "audio/z/w", "audio/z-2"]
    for segment, name in zip(segments, names, strict=True):
        assert (made.path / segment.audio).read_bytes() == (source / name).read_bytes()


def test_a_full_disk_names_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sound(tmp_path / "source" / "a.wav")
    table = tsv(tmp_path, "a\ta.wav\tone\teins\ttrain\tg")

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    def no_link(*paths: object) -> None:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run_corpus(CorpusConfig(format="tsv"), table, tmp_path / "c")
    assert str(caught.value.filename).endswith("/audio/a.wav")
    assert caught.value.filename != str(source)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sound(source / "good.wav", 1.0)
    sound(source / "long.wav", 31.0)
    text(source / "words.wav", "this is text")
    (source / "empty.wav").touch()
    table = tsv(
        tmp_path,
        "a\tgood.wav\tone\teins\ttrain\tg1\t\t",
        "b\tmissing.wav\ttwo\tzwei\ttrain\tg1\t\t",
        "c\twords.wav\tthree\tdrei\ttrain\tg1\t\t",
        "d\tempty.wav\tfour\tvier\ttrain\tg1\t\t",
        "e\tlong.wav\tfive\tfünf\ttrain\tg1\t\t",
        "f\tgood.wav\tsix\t\ttrain\tg1\t\t",
        "g\tgood.wav\tone\teins\ttrain\tg1\t\t",
        "h\tgood.wav\tseven\tsieben\ttrain\tg1\t0.5\t1.0",
        "a\tgood.wav\teight\tacht\ttrain\tg1\t\t",
        "j\tgood.wav\tnine\tneun\tholiday\tg1\t\t",
        "k\tgood.wav\tten",
        "l\tgood.wav\televen\telf\ttest\tg1\t\t",
        header="id\taudio\ttext\tde\tsplit\tgroup\toffset\tduration",
    )
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "corpus")
    expected = {
        3: "no such audio file",
        4: "not readable as audio",
        5: "0 bytes",
        6: "31.00 s long",
        7: "the de text is empty",
        8: "same text as",
        9: "past the end",
        10: "used twice",
        11: "split 'holiday'",
        12: "3 columns",
        13: "group 'g1' is in test, and in train at",
    }
    for line, fault in expected.items():
        assert any(f"table.tsv:{line}: " in row and fault in row for row in message.splitlines()), (
            line,
            message,
        )


def test_the_copy_of_a_faulty_segment_is_kept(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "b.wav")
    lines = [
        "x\tgone.wav\tHello\tHallo\ttrain\tg",
        "x\tb.wav\tHello\tHallo\ttrain\tg",
    ]
    config = CorpusConfig(format="tsv", faulty="drop")
    made = run_corpus(config, tsv(tmp_path, *lines), tmp_path / "c")
    (kept,) = read_corpus(made.path).segments
    assert kept.id == "x" and kept.source_text == "Hello"


def test_columns_that_nothing_is_done_with_are_told(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    header = "audio\tstart\tend\tde\tcmn"
    found = read_source(
        CorpusConfig(format="tsv"), str(tsv(tmp_path, "a.wav\t1\t2\tHallo\tx", header=header))
    )
    assert any("nothing is done with start, end, cmn" in line for line in found.warnings)


def test_groups_in_two_splits(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav", 5.0)
    table = tsv(
        tmp_path,
        "a\ta.wav\tone\teins\ttrain\tann",
        "b\ta.wav\ttwo\tzwei\tselect\tbob",
        "c\ta.wav\tthree\tdrei\ttest\tann",
    )
    message = faults_of(CorpusConfig(format="tsv"), table, tmp_path / "corpus")
    assert f"{table}:4: group 'ann' is in test, and in train at {table}:2" in message
    config = CorpusConfig(format="tsv", faulty="drop")
    message = faults_of(config, table, tmp_path / "corpus")
    assert "group 'ann' is in test and train" in message


def test_dropping_is_on_record(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav", 5.0)
    table = tsv(
        tmp_path,
        *(
            f"{name}\ta.wav\tsame\tgleich {name}\t{split}\t{name}"
            for name, split in (("a", "train"), ("b", "select"), ("c", "test"))
        ),
        "d\tgone.wav\tx\ty\ttrain\td",
    )
    config = CorpusConfig(format="tsv", faulty="drop")
    made = run_corpus(config, table, tmp_path / "corpus")
    assert made.extra["faults_dropped"] == 1
    assert "table.tsv:5" in (made.path / "dropped.json").read_text()
    assert len(read_corpus(made.path).segments) == 3


def test_halve_corpus_again(tmp_path: Path, tiny_corpus: Path) -> None:
    made = run_corpus(CorpusConfig(format="halve", lang=("de",)), tiny_corpus, tmp_path / "c")
    before, after = read_corpus(tiny_corpus), read_corpus(made.path)
    assert [s.id for s in before.segments] == [s.id for s in after.segments]
    assert {tuple(s.references) for s in after.segments} == {("de",)}
    again = run_corpus(CorpusConfig(format="halve", lang=("de",)), tiny_corpus, tmp_path / "d")
    assert artefact.identity(made.path) == artefact.identity(again.path)


def test_a_corpus_of_other_speech_stays_that(tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    for name in ("a", "b", "c"):
        sound(tmp_path / f"{name}.wav")
    lines = ["audio\tcs\ten\tsplit"]
    splits = {"a": "train", "b": "select", "c": "test"}
    lines += [f"{name}.wav\tveta {name}\ttext {name}\t{splits[name]}" for name in splits]
    table.write_text("\n".join(lines) + "\n")
    first = run_corpus(CorpusConfig(format="tsv", source_lang="cs"), table, tmp_path / "first")
    again = run_corpus(CorpusConfig(format="halve"), first.path, tmp_path / "again")
    for segment in read_corpus(again.path).segments:
        assert (segment.source_lang, set(segment.references)) == ("cs", {"en"})


def test_another_data_set_of_the_hub_is_another_corpus(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_source(CorpusConfig(format="halve"), tiny_corpus)
    monkeypatch.setattr(importers, "read_source", lambda config, source: rows)
    config = CorpusConfig(format="hf", faulty="drop", duplicates="keep")
    for name, is_made in (("some/speech", False), ("some/speech", True), ("other/speech", False)):
        step = steps.corpus(config, name, tmp_path / "corpus")
        assert steps.up_to_date(step) == is_made
        step.work(SILENT)


def test_a_copy_that_a_kill_cut_short_is_made_again(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audio on another file system is copied: what stands in its place is whole or not there."""
    copy, copied = shutil.copyfile, []

    def torn(source: Path, target: Path) -> None:
        if len(copied) == 2:
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise KeyboardInterrupt
        copied.append(copy(source, target))

    def no_link(*paths: object) -> None:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(shutil, "copyfile", torn)
    config = CorpusConfig(format="halve")
    with pytest.raises(KeyboardInterrupt):
        run_corpus(config, tiny_corpus, tmp_path / "out")
    monkeypatch.setattr(shutil, "copyfile", copy)
    made = run_corpus(config, tiny_corpus, tmp_path / "out")
    assert artefact.verify(made.path) == []
    for segment in read_corpus(made.path).segments:
        source = tiny_corpus / segment.audio
        assert (made.path / segment.audio).read_bytes() == source.read_bytes()


def test_unknown_things(tmp_path: Path) -> None:
    assert "does not exist" in faults_of(
        CorpusConfig(format="iwslt"), tmp_path / "no", tmp_path / "c"
    )
    (tmp_path / "empty").mkdir()
    assert "segments YAML" in faults_of(
        CorpusConfig(format="iwslt"), tmp_path / "empty", tmp_path / "c"
    )
    assert "segmented_wavs" in faults_of(
        CorpusConfig(format="acl6060"), tmp_path / "empty", tmp_path / "c"
    )
    table = tsv(tmp_path, header="sound\twords")
    assert "tab-separated" in faults_of(CorpusConfig(format="tsv"), table, tmp_path / "c")


def test_shares_must_leave_something_to_train_on() -> None:
    for shares in ((0.6, 0.4), (-0.1, 0.1), (0.1, 1.5)):
        with pytest.raises(ValidationError):
            CorpusConfig(format="tsv", select_share=shares[0], test_share=shares[1])


def test_speech_for_a_model_that_reads_has_no_longest_segment(tmp_path: Path) -> None:
    sound(tmp_path / "source" / "a.wav", 2.0)
    text(tmp_path / "source" / "t.tsv", "audio\tde\ttext\tsplit", "a.wav\teins\tone\ttrain")
    config = CorpusConfig(format="tsv", family="text")
    made = run_corpus(config, tmp_path / "source" / "t.tsv", tmp_path / "corpus")
    assert made.extra["segments"] == {"train": 1}
