"""Data sets in Hugging Face's forms."""

import sys
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from halve.corpus import read_corpus
from halve.errors import MissingExtraError
from halve.importers import CorpusConfig, run_corpus
from halve.importers.base import Sound, split_of_set
from halve.importers.hf import import_hf
from tests.importing import faults_of, sound, text


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
