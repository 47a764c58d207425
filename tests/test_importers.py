"""Each importer on its real layout; every fault named with file and line."""

import errno
import json
import os
import re
import shutil
import sys
import tracemalloc
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from halve import artefact, importers
from halve.corpus import read_corpus
from halve.errors import CorpusError, MissingExtraError
from halve.importers import CorpusConfig, read_source, run_corpus
from halve.importers.base import Row, Sound, split_of_set
from halve.importers.hf import import_hf
from halve.importers.iwslt import import_iwslt
from halve.importers.splits import divide
from halve.progress import SILENT, Advance, Progress
from pipeline import steps


def sound(path: Path, duration_s: float = 1.0, rate_hz: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    noise = np.random.default_rng(seed).normal(0, 0.1, round(duration_s * rate_hz))
    soundfile.write(path, noise, rate_hz)
    return path


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf8")
    return path


class Heard(Progress):
    """Keeps what was told: warnings, and each task with its total and its steps."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.tasks: list[tuple[str, int | None, int]] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        steps = [done]
        yield lambda n=1, note="": steps.append(n)
        self.tasks.append((label, total, sum(steps)))


def faults_of(config: CorpusConfig, source: Path, out: Path) -> str:
    with pytest.raises(CorpusError) as error:
        run_corpus(config, source, out)
    assert not out.exists(), "nothing half-written"
    assert not list(out.parent.glob(f".{out.name}*"))
    return str(error.value)


def iwslt_set(root: Path, name: str, talks: dict[str, int]) -> None:
    segments, number = [], 0
    for talk, count in talks.items():
        sound(root / name / "wav" / f"{talk}.wav", count * 1.0)
        segments += [
            f"- {{duration: 0.9, offset: {i}.05, wav: {talk}.wav, speaker_id: s1}}"
            for i in range(count)
        ]
        number += count
    text(root / name / "txt" / f"{name}.yaml", *segments)
    text(root / name / "txt" / f"{name}.en", *(f"sentence {name} {i}" for i in range(number)))
    text(root / name / "txt" / f"{name}.de", *(f"Satz {name} {i}" for i in range(number)))


def test_iwslt_layout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    iwslt_set(source, "train", {"ted_1": 3, "ted_2": 2})
    iwslt_set(source, "dev", {"ted_3": 2})
    iwslt_set(source, "tst2022", {"2022.acl-long.268": 2})
    made = run_corpus(CorpusConfig(format="iwslt"), source, tmp_path / "corpus")
    corpus = read_corpus(made.path)
    assert made.extra["segments"] == {"select": 2, "test": 2, "train": 5}
    assert [s.group for s in corpus.split("test")] == ["2022.acl-long.268"] * 2
    third = corpus.split("train")[2]
    assert (third.offset_s, third.references) == (2.05, {"de": "Satz train 2"})
    assert third.extra == {"speaker": "s1"}
    assert corpus.audio(third).shape == (14_400,)
    assert artefact.verify(made.path) == []
    yaml = source / "dev" / "txt" / "dev.yaml"
    rows = import_iwslt(str(yaml), CorpusConfig(format="iwslt")).rows
    assert [row.id for row in rows] == ["dev-00001", "dev-00002"]
    assert all(row.audio == source / "dev" / "wav" / "ted_3.wav" for row in rows)


def test_segments_on_one_line_stay_apart(tmp_path: Path) -> None:
    """JSON is YAML: a segments file and an XML text may hold all of them on one line."""
    source = tmp_path / "iwslt"
    for name in ("train", "dev", "tst"):
        sound(source / f"{name}.wav", 3.0)
        entries = [{"wav": f"{name}.wav", "offset": i, "duration": 0.5 + i / 10} for i in range(3)]
        text(source / f"{name}.yaml", json.dumps(entries))
        for lang in ("en", "de"):
            text(source / f"{name}.{lang}", *(f"{lang} {name} {i}" for i in range(3)))
    made = run_corpus(CorpusConfig(format="iwslt"), source, tmp_path / "c")
    found = read_corpus(made.path).split("train")
    assert [s.id for s in found] == ["train-00001", "train-00002", "train-00003"]
    assert [(s.offset_s, s.duration_s) for s in found] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert [s.references["de"] for s in found] == ["de train 0", "de train 1", "de train 2"]
    # Of three on one line only the faulty one is left out, and the message tells which that is.
    text(source / "train.de", "de 0", "", "de 2")
    made = run_corpus(CorpusConfig(format="iwslt", faulty="drop"), source, tmp_path / "d")
    kept = read_corpus(made.path).split("train")
    assert [s.id for s in kept] == ["train-00001", "train-00003"]
    assert re.search(r"train\.yaml:1:\d+: the de text", (made.path / "dropped.json").read_text())


def test_acl6060_on_one_line(tmp_path: Path) -> None:
    source = acl6060(tmp_path / "source")
    for path in source.rglob("*.xml"):
        path.write_text(path.read_text().replace("\n", " "))
    made = run_corpus(CorpusConfig(format="acl6060", split="given"), source, tmp_path / "c")
    assert [s.id for s in read_corpus(made.path).segments] == [
        *(f"dev-{i:04d}" for i in (1, 2, 3, 4)),
        "eval-0001",
        "eval-0002",
    ]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    source, disk = tmp_path / "source", tmp_path / "disk"
    for name in ("train", "dev", "tst"):
        iwslt_set(source, name, {f"{name}_talk": 2})
    disk.mkdir()
    (source / "train").rename(disk / "train")
    (source / "train").symlink_to(disk / "train")
    (source / "dev" / "wav").rename(disk / "wav")
    (source / "dev" / "wav").symlink_to(disk / "wav")
    (source / "dev" / "round").symlink_to(source)
    (source / "self").symlink_to(source / "self")
    made = run_corpus(CorpusConfig(format="iwslt"), source, tmp_path / "c")
    assert made.extra["segments"] == {"select": 2, "test": 2, "train": 2}
    talks = acl6060(tmp_path / "acl")
    gold = talks / "2/acl_6060/dev/segmented_wavs/gold"
    gold.rename(disk / "gold")
    gold.symlink_to(disk / "gold")
    (tmp_path / "link").symlink_to(talks)
    config = CorpusConfig(format="acl6060", split="given")
    made = run_corpus(config, tmp_path / "link", tmp_path / "d")
    assert made.extra["segments"] == {"select": 4, "test": 2}


def test_another_yaml_is_left_aside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("train", "dev", "tst"):
        iwslt_set(source, name, {f"{name}_talk": 1})
    text(source / "recipe.yaml", "lang: de")
    text(source / "unsaid.yaml", "- {wav: train_talk.wav, offset: 0, duration: 1}")
    heard = Heard()
    made = run_corpus(CorpusConfig(format="iwslt"), source, tmp_path / "c", heard)
    assert made.extra["segments"] == {"select": 1, "test": 1, "train": 1}
    assert f"{source / 'recipe.yaml'} is left aside: no list" in heard.warnings[0]
    assert f"{source / 'unsaid.yaml'} is left aside: no text" in heard.warnings[1]
    # With a text beside it, it was meant: a set is not lost for a slip of the pen.
    text(source / "train" / "txt" / "train.yaml", "lang: de")
    message = faults_of(CorpusConfig(format="iwslt"), source, tmp_path / "d")
    assert "train.yaml: no list" in message


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ("{wav: [a.wav], offset: 0, duration: 1}", "wav is a list"),
        ("{wav: a.wav, offset: {a: b}, duration: 1}", "offset is a mapping"),
        ("{? [a, b] : c, wav: a.wav, offset: 0, duration: 1}", "a list where a name should be"),
        ("{wav: , offset: 0, duration: 1}", "wav is empty"),
        ("{wav: a.wav, wav: b.wav, offset: 0, duration: 1}", "wav is there twice"),
        ("{wav: a.wav, offset: nan, duration: 1}", "offset 'nan' is no number of seconds"),
        ("{wav: a.wav, offset: 0, duration: inf}", "duration 'inf' is no number of seconds"),
        ("{wav: a.wav, offset: -1, duration: 1}", "offset '-1' is no number of seconds"),
        ("{wav: a.wav, offset: 0}", "no duration"),
        ("a.wav", "not a mapping"),
    ],
)
def test_what_is_no_segment_is_named(tmp_path: Path, item: str, fault: str) -> None:
    source = tmp_path / "source"
    sound(source / "a.wav", 2.0)
    good = "- {wav: a.wav, offset: 0.5, duration: 0.9, notes: [read, twice]}"
    text(source / "train.yaml", f"- {item}", good)
    text(source / "train.en", "one", "two")
    text(source / "train.de", "eins", "zwei")
    message = faults_of(CorpusConfig(format="iwslt"), source, tmp_path / "c")
    assert f"train.yaml:1: {fault}" in message
    assert "1 faults" in message
    made = run_corpus(CorpusConfig(format="iwslt", faulty="drop"), source, tmp_path / "d")
    (kept,) = read_corpus(made.path).segments
    assert (kept.id, kept.references, kept.offset_s) == ("train-00002", {"de": "zwei"}, 0.5)


def test_a_whole_set_is_never_dropped(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("train", "dev"):
        iwslt_set(source, name, {f"{name}_talk": 3})
    text(source / "train" / "txt" / "train.de", "only one line")
    config = CorpusConfig(format="iwslt", faulty="drop")
    message = faults_of(config, source, tmp_path / "c")
    assert "train.de: 1 lines for the 3 segments of train.yaml" in message
    assert "--faulty drop" in message
    # In a FILE_ORDER a segment that cannot be read would move the lines of all that follow.
    order = tmp_path / "order"
    for talk in ("a", "b"):
        sound(order / f"{talk}.wav", 1.0)
        text(order / f"{talk}.yaml", f"- {{wav: {talk}.wav, offset: 0.0, duration: 1.0}}")
    text(order / "a.yaml", "- {wav: a.wav, offset: x, duration: 1.0}")
    text(order / "FILE_ORDER", "a", "b")
    text(order / "order.en", "one", "two")
    text(order / "order.de", "eins", "zwei")
    message = faults_of(config, order, tmp_path / "c")
    assert "a.yaml:1: offset 'x'" in message


def test_iwslt_file_order(tmp_path: Path) -> None:
    source = tmp_path / "tst"
    for talk in ("a", "b"):
        sound(source / f"{talk}.wav", 1.0)
        text(source / f"{talk}.yaml", f"- {{wav: {talk}.wav, offset: 0.0, duration: 1.0}}")
    text(source / "FILE_ORDER", "b", "a")
    text(source / "tst.en", "second file first", "then the first")
    text(source / "tst.de.txt", "zweite Datei zuerst", "dann die erste")
    made = run_corpus(CorpusConfig(format="iwslt", split="given"), source, tmp_path / "corpus")
    segments = read_corpus(made.path).segments
    assert [(s.audio, s.references["de"]) for s in segments] == [
        ("audio/b.wav", "zweite Datei zuerst"),
        ("audio/a.wav", "dann die erste"),
    ]


def test_text_beside_a_yaml_counts_as_input(tmp_path: Path) -> None:
    source = tmp_path / "tst"
    for talk in ("a", "b"):
        sound(source / f"{talk}.wav", 1.0)
        text(source / f"{talk}.yaml", f"- {{wav: {talk}.wav, offset: 0.0, duration: 1.0}}")
    text(source / "FILE_ORDER", "b", "a")
    text(source / "txt" / "tst.en", "one", "two")
    german = text(tmp_path / "txt" / "tst.de", "eins", "zwei")
    french = text(tmp_path / "txt" / "tst.fr", "un", "deux")
    config = CorpusConfig(format="iwslt", lang=("de",))
    given = (config, str(source / "a.yaml"), tmp_path / "corpus")
    assert steps.carry_out(steps.corpus(*given), SILENT)[1]
    assert not steps.carry_out(steps.corpus(*given), SILENT)[1]
    text(french, "un", "trois")
    assert steps.up_to_date(steps.corpus(*given)), "it is not imported"
    text(german, "eins", "zwo")
    assert steps.carry_out(steps.corpus(*given), SILENT)[1]
    assert read_corpus(tmp_path / "corpus").segments[1].references == {"de": "zwo"}
    for name in ("FILE_ORDER", "b.yaml"):
        assert steps.up_to_date(steps.corpus(*given))
        before = (source / name).read_text()
        (source / name).write_text(f"{before}\n")
        assert not steps.up_to_date(steps.corpus(*given)), name
        (source / name).write_text(before)


def acl6060(root: Path) -> Path:
    number = 0
    for name, talks in {"dev": ("268", "367"), "eval": ("110",)}.items():
        folder = root / "2" / "acl_6060" / name
        for lang, word in (("en", "Sentence"), ("de", "Satz"), ("zh", "句子")):
            lines, index = [f'<refset setid="x" trglang="{lang}">'], 0
            for talk in talks:
                lines += [
                    f'<doc docid="2022.acl-long.{talk}" genre="presentations">',
                    "<abstract>a < b & c</abstract>",
                ]
                for _ in range(2):
                    index += 1
                    lines.append(f'<seg id="{index}"> {word} {name} {index} &amp; more</seg>')
                lines.append("</doc>")
            text(folder / "text" / "xml" / f"ACL.6060.{name}.en-xx.{lang}.xml", *lines, "</refset>")
        for index in range(1, 2 * len(talks) + 1):
            number += 1
            sound(folder / "segmented_wavs" / "gold" / f"sent_{index}.wav", 0.5 + number / 10)
    return root


def test_acl6060_layout(tmp_path: Path) -> None:
    source = acl6060(tmp_path / "source")
    made = run_corpus(
        CorpusConfig(format="acl6060", split="group", lang=("de",)), source, tmp_path / "c"
    )
    segments = read_corpus(made.path).segments
    assert [s.id for s in segments] == [f"dev-{i:04d}" for i in (1, 2, 3, 4)] + [
        "eval-0001",
        "eval-0002",
    ]
    assert segments[2].group == "2022.acl-long.367"
    assert segments[2].source_text == "Sentence dev 3 & more"
    assert segments[2].references == {"de": "Satz dev 3 & more"}
    assert segments[2].duration_s == pytest.approx(0.8)
    assert {s.split for s in segments} == {"train", "select", "test"}


def test_acl6060_counts_must_agree(tmp_path: Path) -> None:
    source = acl6060(tmp_path / "source")
    (source / "2/acl_6060/eval/segmented_wavs/gold/sent_2.wav").unlink()
    message = faults_of(CorpusConfig(format="acl6060"), source, tmp_path / "c")
    assert "eval.en-xx.de.xml: 2 sentences for 1 files" in message


def test_acl6060_names_the_fault_of_a_lone_set(tmp_path: Path) -> None:
    source = acl6060(tmp_path / "source")
    shutil.rmtree(source / "2/acl_6060/eval")
    (source / "2/acl_6060/dev/segmented_wavs/gold/sent_4.wav").unlink()
    message = faults_of(CorpusConfig(format="acl6060"), source, tmp_path / "c")
    assert "dev.en-xx.de.xml: 4 sentences for 3 files" in message


def test_acl6060_numbers_have_no_gap(tmp_path: Path) -> None:
    """sent_7.wav is the seventh sentence: with files missing, the next in line is another's."""
    source = acl6060(tmp_path / "source")
    gold = source / "2/acl_6060/dev/segmented_wavs/gold"
    (gold / "sent_2.wav").rename(gold / "sent_7.wav")
    for faulty in ("refuse", "drop"):
        config = CorpusConfig(format="acl6060", faulty=faulty)
        message = faults_of(config, source, tmp_path / "c")
        assert f"{gold}: where sent_2.wav should be stands sent_3.wav" in message
        assert "numbered 1 to 4" in message


def test_paper_split_is_the_papers() -> None:
    rows = [Row(f"f:{i}", str(i), Path("a.wav"), "", {"de": "x"}, group="talk") for i in range(884)]
    divided = divide(rows, CorpusConfig(format="acl6060", split="paper"))
    counts = {
        name: sum(row.split == name for row in divided) for name in ("train", "select", "test")
    }
    assert counts == {"train": 784 - 88, "select": 88, "test": 100}
    # datasets 5.2: Dataset.from_dict({"i": range(884)}).train_test_split(test_size=100, seed=0)
    first = np.random.default_rng(0).permutation(884)[:100]
    assert {i for i, row in enumerate(divided) if row.split == "test"} == set(first.tolist())
    with pytest.raises(CorpusError, match="884"):
        divide(rows[:-1], CorpusConfig(format="acl6060", split="paper"))


def test_group_split_is_whole_and_repeatable() -> None:
    rows = [
        Row(f"f:{i}", str(i), Path("a.wav"), "", {"de": "x"}, group=f"talk{i // 10}")
        for i in range(200)
    ]
    config = CorpusConfig(format="tsv", split="group")
    divided = divide(rows, config)
    splits = {row.group: {r.split for r in divided if r.group == row.group} for row in divided}
    assert all(len(names) == 1 for names in splits.values())
    assert sum(row.split == "test" for row in divided) == 20
    assert divided == divide(rows, config)
    assert divided != divide(rows, config.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("test", "select", "names"),
    [
        (0.0, 0.2, {"train", "select"}),
        (0.2, 0.0, {"train", "test"}),
        (0.0, 0.0, {"train"}),
        (0.2, 0.2, {"train", "select", "test"}),
    ],
)
def test_a_split_without_a_share_gets_no_group(test: float, select: float, names: set[str]) -> None:
    config = CorpusConfig(format="tsv", split="group", test_share=test, select_share=select)
    rows = [
        Row(f"f:{i}", str(i), Path("a.wav"), "", {"de": "x"}, group=f"talk{i}") for i in range(10)
    ]
    assert {row.split for row in divide(rows, config)} == names
    few = rows[: len(names)]
    assert {row.split for row in divide(few, config)} == names
    if len(names) > 1:
        with pytest.raises(CorpusError, match=f"at least {len(names)}, so that train"):
            divide(few[:-1], config)


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


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="train"):
        run_corpus(CorpusConfig(format="hf"), "someone/something", tmp_path / "c")
    monkeypatch.setitem(sys.modules, "datasets", _datasets(tmp_path))
    made = run_corpus(
        CorpusConfig(format="hf", split="segment"), "someone/something", tmp_path / "c"
    )
    segments = read_corpus(made.path).segments
    assert segments[0].references == {"de": "Satz 0"}
    assert segments[0].source_text == "sentence 0"
    assert {s.split for s in segments} == {"train", "select", "test"}
    assert made.recipe["source"] == "someone/something"
    assert read_corpus(made.path).audio(segments[3]).shape == (16_000,)


def test_audio_of_a_data_set_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(_Table):
        """Makes each record's bytes anew, as a data set on disk does."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return (self[index] for index in range(len(self)))

        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index) | {"audio": bytes([index]) * 1_000_000}

    table = Large({"text_en": f"s {i}", "text_de": f"t {i}"} for i in range(20))
    monkeypatch.setattr(_Table, "features", {"audio": types.SimpleNamespace(dtype="binary")})
    found = types.SimpleNamespace(
        load_dataset=lambda source, subset: {"train": table}, Audio=type("Audio", (), {})
    )
    monkeypatch.setitem(sys.modules, "datasets", found)
    tracemalloc.start()
    try:
        rows = import_hf("someone/something", CorpusConfig(format="hf")).rows
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    sounds = [row.audio for row in rows if isinstance(row.audio, Sound)]
    assert {one.size_bytes for one in sounds} == {1_000_000}
    assert [one.data == bytes([place]) * 1_000_000 for place, one in enumerate(sounds)] == [
        True
    ] * 20


def test_hugging_face_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = sound(tmp_path / "one.wav").read_bytes()
    records = [
        {
            "audio": {"bytes": data, "path": "x.wav"},
            "text_en": f"s {i}",
            "text_de": f"t {i}",
            "talk": f"t{i // 2}",
        }
        for i in range(8)
    ]
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text_en": datasets.Value("string"),
            "text_de": datasets.Value("string"),
            "talk": datasets.Value("string"),
        }
    )
    parts = {
        "train": datasets.Dataset.from_list(records[:4], features=features),
        "test": datasets.Dataset.from_list(records[4:], features=features),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    config = CorpusConfig(format="hf", group_column="talk")
    segments = read_corpus(run_corpus(config, tmp_path / "saved", tmp_path / "c").path).segments
    assert [s.split for s in segments] == ["train"] * 4 + ["test"] * 4
    assert (segments[5].group, segments[5].references) == ("t2", {"de": "t 5"})
    assert "columns" in faults_of(
        CorpusConfig(format="hf", audio_column="sound"), tmp_path / "saved", tmp_path / "d"
    )


def test_hugging_face_names_what_is_missing(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = sound(tmp_path / "one.wav").read_bytes()

    def saved(name: str, **columns: list[Any]) -> Path:
        rows = {"audio": [data] * 4, "text_de": [f"t {i}" for i in range(4)], **columns}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    config = CorpusConfig(format="hf", split="segment")
    made = run_corpus(config, saved("bytes"), tmp_path / "c")
    assert len(read_corpus(made.path).segments) == 4
    message = faults_of(config, saved("numbers", audio=[1, 2, 3, 4]), tmp_path / "d")
    assert "The column 'audio'" in message and "int64" in message
    message = faults_of(config, saved("texts", text_de=[1, 2, 3, 4]), tmp_path / "d")
    assert "texts:train:2: text_de is '3' (int), not a text" in message
    message = faults_of(config, saved("none", audio=[data, None, data, data]), tmp_path / "d")
    assert "none:train:1: no audio" in message and "1 faults" in message
    grouped = CorpusConfig(format="hf", group_column="speaker")
    message = faults_of(grouped, tmp_path / "bytes", tmp_path / "d")
    assert "has no column 'speaker'. Expected: one of audio, text_de" in message
    source = saved("speakers", speaker=["ann", None, "", "bob"])
    segments = read_corpus(run_corpus(grouped, source, tmp_path / "e").path).segments
    assert [s.group for s in segments] == ["ann", "train-000001", "train-000002", "bob"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("tst2022", "test"),
        ("tst-COMMON", "test"),
        ("IWSLT.dev2010", "select"),
        ("train_clean", "train"),
        ("validation.de", "select"),
        ("latest", None),
        ("talks-2022", None),
    ],
)
def test_a_set_s_name_says_its_split(name: str, split: str | None) -> None:
    assert split_of_set(name) == split


def test_hugging_face_samples_become_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    wave = np.sin(np.arange(24_000) / 9).astype(np.float32) / 2

    def saved(name: str, kind: str, arrays: list[Any], rates: list[int | None]) -> Path:
        feature = {
            "array": datasets.Sequence(datasets.Value(kind)),
            "sampling_rate": datasets.Value("int64"),
        }
        columns = {"audio": feature, "text_de": datasets.Value("string")}
        rows = {
            "audio": [
                {"array": array, "sampling_rate": rate}
                for array, rate in zip(arrays, rates, strict=True)
            ],
            "text_de": [f"t {i}" for i in range(len(arrays))],
        }
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
        made.save_to_disk(str(tmp_path / name))
        return tmp_path / name

    config = CorpusConfig(format="hf", split="segment")
    loud = (np.sin(np.arange(24_000) / 5) / 2).astype(np.float32)
    source = saved("floats", "float32", [wave, loud, wave[:20_000]], [24_000] * 3)
    corpus = read_corpus(run_corpus(config, source, tmp_path / "c").path)
    assert sorted(s.duration_s for s in corpus.segments) == pytest.approx(
        [0.83, 1.0, 1.0], abs=0.01
    )
    read, rate = soundfile.read(corpus.path / corpus.segments[0].audio, dtype="float32")
    assert rate == 24_000 and np.array_equal(read, wave)
    whole = (wave * 20_000).astype(np.int16)
    source = saved("whole", "int16", [whole, whole[:9_000], whole[:8_000]], [16_000] * 3)
    corpus = read_corpus(run_corpus(config, source, tmp_path / "d").path)
    read, rate = soundfile.read(corpus.path / corpus.segments[0].audio, dtype="int16")
    assert rate == 16_000 and np.array_equal(read, whole)
    message = faults_of(
        config, saved("rates", "float32", [wave] * 3, [16_000, None, 0]), tmp_path / "e"
    )
    assert "rates:train:1: sampling_rate is None" in message and "rates:train:2:" in message
    large = [whole.astype(np.int32) * 4] * 3
    message = faults_of(config, saved("large", "int32", large, [16_000] * 3), tmp_path / "e")
    assert "more than 16 bits" in message


def test_hugging_face_paths_are_relative_to_the_source(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = tmp_path / "source"
    for index in range(3):
        sound(source / f"a{index}.wav")
    lines = ["audio,text_en,text_de", *(f"a{i}.wav,s{i},t{i}" for i in range(3))]
    text(source / "train.csv", *lines)
    config = CorpusConfig(format="hf", split="segment")
    made = run_corpus(config, source, tmp_path / "c")
    assert [s.audio for s in read_corpus(made.path).segments] == [
        "audio/a0.wav",
        "audio/a1.wav",
        "audio/a2.wav",
    ]


def test_hugging_face_tells_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` wraps it: the outermost error says no more than that there was one."""

    def load(cause: Exception) -> Any:
        def load_dataset(source: str, subset: str | None) -> None:
            raise RuntimeError("An error occurred while generating the dataset") from cause

        return types.SimpleNamespace(load_dataset=load_dataset)

    config, source = CorpusConfig(format="hf"), tmp_path / "source"
    source.mkdir()
    cause: Exception = ImportError("To support encoding audio data, please install 'torchcodec'.")
    monkeypatch.setitem(sys.modules, "datasets", load(cause))
    message = faults_of(config, source, tmp_path / "c")
    assert "pip install torchcodec" in message and "--format tsv" in message
    monkeypatch.setitem(sys.modules, "datasets", load(ValueError("line 3 is torn")))
    assert "(line 3 is torn)" in faults_of(config, source, tmp_path / "c")


class _Table(list[dict[str, Any]]):
    """What the importer asks of a `datasets.Dataset`."""

    column_names = ("index", "audio", "text_en", "text_de")
    features: ClassVar[dict[str, Any]] = {"audio": {"bytes": "binary", "path": "string"}}


def _datasets(tmp_path: Path) -> types.SimpleNamespace:
    data = sound(tmp_path / "one.wav").read_bytes()
    table = _Table(
        {
            "index": i,
            "audio": {"bytes": data, "path": f"{i}.wav"},
            "text_en": f"sentence {i}",
            "text_de": f"Satz {i}",
        }
        for i in range(10)
    )
    return types.SimpleNamespace(
        load_dataset=lambda source, subset: {"train": table},
        Audio=type("Audio", (), {}),
    )
