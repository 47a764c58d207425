"""Manifests and audio: what is read is what was said, and every fault is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from halve.audio import SAMPLE_RATE_HZ, pcm_sha256, probe, read_audio
from halve.corpus import Segment, check_segments, read_corpus, write_manifest
from halve.errors import CorpusError, HalveError
from halve.languages import language, token_limit
from tests import tiny


@pytest.mark.parametrize(
    ("rate", "channels", "subtype", "format_"),
    [
        (8000, 1, "PCM_16", "WAV"),
        (16000, 1, "PCM_U8", "WAV"),
        (44100, 2, "PCM_24", "WAV"),
        (48000, 6, "FLOAT", "WAV"),
        (22050, 1, "PCM_16", "FLAC"),
        (48000, 1, "OPUS", "OGG"),
    ],
)
def test_any_format_becomes_16_khz_mono(
    tmp_path: Path, rate: int, channels: int, subtype: str, format_: str
) -> None:
    time_s = np.arange(rate) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time_s).astype(np.float32)
    file = tmp_path / f"tone.{format_.lower()}"
    soundfile.write(
        file, np.repeat(wave[:, None], channels, 1), rate, format=format_, subtype=subtype
    )
    samples = read_audio(file)
    assert abs(len(samples) - SAMPLE_RATE_HZ) <= 200
    spectrum = np.abs(np.fft.rfft(samples[:SAMPLE_RATE_HZ]))
    assert abs(spectrum.argmax() * SAMPLE_RATE_HZ / min(len(samples), SAMPLE_RATE_HZ) - 440) < 3
    assert probe(file).sample_rate_hz == rate


def test_a_stretch_is_cut_where_it_was_asked(tmp_path: Path) -> None:
    wave = tiny.tone(2.0, 1)
    soundfile.write(tmp_path / "a.wav", wave, SAMPLE_RATE_HZ, subtype="FLOAT")
    part = read_audio(tmp_path / "a.wav", 0.5, 0.25)
    assert np.array_equal(part, wave[8000:12000])


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "nan"])
def test_what_is_no_audio_gets_one_clear_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "bad.wav"
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("this is not audio")
    elif kind == "nan":
        soundfile.write(file, np.full(1600, np.nan, np.float32), SAMPLE_RATE_HZ, subtype="FLOAT")
    with pytest.raises(CorpusError) as caught:
        read_audio(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_pcm_hash_is_of_the_sound_not_the_container(tmp_path: Path) -> None:
    wave = np.round(tiny.tone(0.5, 2) * 32768) / 32768
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, wave, SAMPLE_RATE_HZ, subtype="PCM_16")
    assert pcm_sha256(read_audio(tmp_path / "a.wav")) == pcm_sha256(read_audio(tmp_path / "a.flac"))


def segment(**changes) -> Segment:
    values = {
        "id": "a",
        "audio": "a.wav",
        "offset_s": 0.0,
        "duration_s": 1.0,
        "source_lang": "en",
        "source_text": "open the file",
        "references": {"de": "öffnen", "zh": "打开"},
        "split": "train",
        "group": "g",
        "extra": {"voice": "slt"},
    }
    return Segment(**{**values, **changes})


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    written = [segment(), segment(id="b", split="test", group="h")]
    write_manifest(tmp_path, written)
    assert list(read_corpus(tmp_path).segments) == written


def test_only_a_line_feed_ends_a_line_of_the_manifest(tmp_path: Path) -> None:
    """JSON leaves U+2028 and its like as they are; a text that holds one is read back whole."""
    said = "one\u2028two\u2029three\x85four"
    record = {
        "id": "a", "audio": "a.wav", "offset_s": 0.0, "duration_s": 1.0, "source_lang": "en", "source_text": said,
        "references": {"de": said}, "split": "train", "group": "g",
    }  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    (segment,) = read_corpus(tmp_path).segments
    assert segment.source_text == said and segment.references == {"de": said}


def test_faulty_lines_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"id": "a"}\nnonsense\n')
    with pytest.raises(CorpusError) as caught:
        read_corpus(tmp_path)
    assert "manifest.jsonl:1" in str(caught.value)
    assert "manifest.jsonl:2" in str(caught.value)


def test_every_fault_is_found_at_once(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tiny.tone(1.0, 1), SAMPLE_RATE_HZ)
    segments = [
        segment(),
        segment(duration_s=2.0, references={"de": " "}),
        segment(id="c", audio="none.wav"),
        segment(id="d", split="test"),
        segment(id="e", duration_s=0.8, references={}),
        segment(id="f", duration_s=0.9, offset_s=-1),
    ]
    faults = "\n".join(check_segments(tmp_path, segments, max_audio_s=1.5))
    for needle in (
        "used twice",
        "the de text is empty",
        "past the end of a.wav",
        "model hears at most",
        "no such audio file",
        "group 'g' is in test and train",
        "no translation",
        "make no segment",
        "same audio and text as a",
    ):
        assert needle in faults, needle
    assert check_segments(tmp_path, [segment()], max_audio_s=30) == []


def test_a_split_says_what_there_is_instead(tiny_corpus: Path) -> None:
    corpus = read_corpus(tiny_corpus)
    limited = corpus.split("train", limit=5)
    assert [s.id for s in limited] == ["s000", "s002", "s004", "s007", "s009"]
    with pytest.raises(CorpusError, match="no test segment with a fr reference"):
        corpus.split("test", lang="fr")


def test_languages() -> None:
    assert language("de").name == "German"
    assert language("zh_CN").selection_metric == "chrf"
    with pytest.raises(HalveError, match="Unknown language"):
        language("xx")
    assert token_limit(5.0) == 84
