"""The IWSLT and ACL 60/60 layouts as they are published, and how they are split; every fault named with file and line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from halve import artefact
from halve.corpus import read_corpus
from halve.errors import CorpusError
from halve.importers import CorpusConfig, read_source, run_corpus
from halve.importers.base import Row
from halve.importers.iwslt import import_iwslt
from halve.importers.splits import divide
from halve.progress import SILENT
from pipeline import steps
from tests.importing import Heard, faults_of, sound, text


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


def test_talks_in_another_order_than_told_are_refused(tmp_path: Path) -> None:
    """The texts follow the YAML: with the talks in another order each segment would get another's text."""
    source = tmp_path / "source"
    iwslt_set(source, "test", {"a": 2, "b": 1})
    text(source / "test" / "FILE_ORDER", "b", "a")
    message = faults_of(CorpusConfig(format="iwslt"), source, tmp_path / "c")
    assert "another order than" in message and "FILE_ORDER" in message
    text(source / "test" / "FILE_ORDER", "a", "b")
    made = run_corpus(CorpusConfig(format="iwslt"), source, tmp_path / "d")
    found = {each.source_text for each in read_corpus(made.path).segments}
    assert found == {"sentence test 0", "sentence test 1", "sentence test 2"}


def test_talks_of_one_name_in_two_sets_are_two(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        iwslt_set(tmp_path / "source", name, {"talk1": 2})
    made = run_corpus(CorpusConfig(format="iwslt"), tmp_path / "source", tmp_path / "c")
    groups = {(each.split, each.group) for each in read_corpus(made.path).segments}
    assert groups == {("train", "train/talk1"), ("select", "dev/talk1")}


def test_talks_of_one_name_in_two_folders_are_told_by_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    entries = []
    for number, speaker in enumerate(("spk1", "spk2"), start=1):
        sound(source / "wav" / speaker / "001.wav", float(number))
        entries.append({"wav": f"{speaker}/001.wav", "offset": 0.0, "duration": 1.0})
    text(source / "txt" / "train.yaml", json.dumps(entries))
    for lang in ("en", "de"):
        text(source / "txt" / f"train.{lang}", *(f"{lang} {number}" for number in (1, 2)))
    rows = read_source(CorpusConfig(format="iwslt"), str(source)).rows
    assert [row.audio.parent.name for row in rows if row.audio] == ["spk1", "spk2"]
    bare = [entry | {"wav": "001.wav"} for entry in entries]
    text(source / "txt" / "train.yaml", json.dumps(bare))
    message = faults_of(CorpusConfig(format="iwslt"), source, tmp_path / "c")
    assert "001.wav may be" in message and "spk2" in message


def test_sets_whose_audio_lies_in_folders_of_their_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("train", "dev"):
        sound(source / "wav" / name / "talk1.wav", 1.0)
        entry = {"wav": "talk1.wav", "offset": 0.0, "duration": 1.0}
        text(source / "txt" / f"{name}.yaml", json.dumps([entry]))
        for lang in ("en", "de"):
            text(source / "txt" / f"{name}.{lang}", f"{name} {lang}")
    rows = read_source(CorpusConfig(format="iwslt"), str(source)).rows
    assert {(row.audio.parent.name, row.source_text) for row in rows if row.audio} == {
        ("train", "train en"),
        ("dev", "dev en"),
    }


def test_an_earlier_corpus_is_no_source_of_audio(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sound(source / "wav" / "talk1.wav", 1.0)
    sound(source / "runs" / "first" / "corpus" / "audio" / "wav" / "talk1.wav", 1.0)
    text(source / "runs" / "first" / "corpus" / "artefact.json", "{}")
    sound(source / "runs" / ".corpus.partial" / "talk1.wav", 1.0)
    text(source / "segments.yaml", "- {wav: talk1.wav, offset: 0.0, duration: 1.0}")
    for lang in ("en", "de"):
        text(source / f"segments.{lang}", lang)
    (row,) = read_source(CorpusConfig(format="iwslt"), str(source)).rows
    assert row.audio == source / "wav" / "talk1.wav"


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
