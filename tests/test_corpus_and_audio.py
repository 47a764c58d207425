"""Manifests and audio: what is read is what was said, and every fault is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from halve.audio import SAMPLE_RATE_HZ, decode_through, pcm_sha256, probe, read_audio
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


def test_a_manifest_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(b"{}\n" + "schließen".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"manifest\.jsonl:2: not UTF-8"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"references": {"de": 5}}, "the de reference is 5, not a text"),
        ({"references": ["öffnen"]}, "not texts by language"),
        ({"source_text": None}, "source_text is null, not a text"),
        ({"group": None}, "group is null, not a text"),
        ({"duration_s": float("nan")}, "duration_s nan is no number of seconds"),
        ({"offset_s": float("inf")}, "offset_s inf is no number of seconds"),
        ({"offset_s": -0.5}, "offset_s -0.5 is no number of seconds"),
        ({"duration_s": True}, "duration_s True is no number of seconds"),
        ({"duration_s": 0}, "holds no sample"),
    ],
)
def test_a_manifest_line_that_is_no_segment(tmp_path: Path, changes: dict, fault: str) -> None:
    record = segment().record()
    (tmp_path / "manifest.jsonl").write_text(
        f"{json.dumps(record)}\n{json.dumps({**record, **changes})}\n5\n"
    )
    with pytest.raises(CorpusError) as caught:
        read_corpus(tmp_path)
    assert len(caught.value.faults) == 2
    assert "manifest.jsonl:2: " in caught.value.faults[0] and fault in caught.value.faults[0]
    assert "manifest.jsonl:3: not a mapping" in caught.value.faults[1]


@pytest.mark.parametrize(
    ("offset_s", "duration_s", "fault"),
    [
        (float("nan"), 0.5, "make no segment"),
        (0.0, float("nan"), "make no segment"),
        (0.1, 0.00001, "hold no sample"),
        (1.005, 0.01, "hold no sample"),
        (0.0, 1 / SAMPLE_RATE_HZ, ""),
    ],
)
def test_a_segment_holds_a_sample(
    tmp_path: Path, offset_s: float, duration_s: float, fault: str
) -> None:
    soundfile.write(tmp_path / "a.wav", tiny.tone(1.0, 1), SAMPLE_RATE_HZ)
    one = segment(offset_s=offset_s, duration_s=duration_s)
    faults = check_segments(tmp_path, [one], max_audio_s=30)
    assert [fault in found for found in faults] == ([True] if fault else [])


def test_a_stretch_past_the_end_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tiny.tone(1.0, 1), SAMPLE_RATE_HZ)
    with pytest.raises(CorpusError, match=r"no sample from 1\.2 s on, the file is 1\.00 s long"):
        read_audio(tmp_path / "a.wav", 1.2, 0.3)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.flac", "FLAC"), ("a.mp3", "MP3"), ("a.wav", "WAV"), ("a.ogg", "OGG")]
)
def test_audio_that_was_cut_short_is_found(tmp_path: Path, name: str, kind: str) -> None:
    """The header of half a file still says how long the whole one was; an Ogg's does not."""
    file = tmp_path / name
    soundfile.write(file, tiny.tone(20.0, 1), SAMPLE_RATE_HZ, format=kind)
    whole = decode_through(file)
    assert (whole.frames, whole.duration_s) == (20 * SAMPLE_RATE_HZ, 20.0)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if kind == "OGG":
        assert decode_through(file).duration_s < 15
        return
    faults = check_segments(tmp_path, [segment(audio=name)], max_audio_s=30)
    assert len(faults) == 1
    assert "damaged or cut short: of 20.00 s only the first" in faults[0]


@pytest.mark.parametrize("tag", [b"", b"TAG" + bytes(125), b"ID3\4\0\0\0\0\0\0"])
def test_an_mp3_that_goes_on_is_not_read_in_part(tmp_path: Path, tag: bytes) -> None:
    """libsndfile takes the first file's length for that of all that are in one."""
    file = tmp_path / "a.mp3"
    soundfile.write(file, tiny.tone(3.0, 1), SAMPLE_RATE_HZ, format="MP3")
    one = file.read_bytes()
    file.write_bytes(one + b"TAG" + bytes(125))
    assert decode_through(file).duration_s == len(read_audio(file)) / SAMPLE_RATE_HZ == 3.0
    file.write_bytes(one + tag + one)
    for read in (read_audio, decode_through):
        with pytest.raises(CorpusError, match=r"first 3\.00 s can be decoded and about 3\.\d+ s"):
            read(file)
    assert len(read_audio(file, 1.0, 0.5)) == SAMPLE_RATE_HZ // 2


def test_an_mp3_that_does_not_say_how_long_it_is_is_not_read_in_part(tmp_path: Path) -> None:
    file = tmp_path / "a.mp3"
    noise = np.random.default_rng(0).normal(0, 0.3, 160_000).astype(np.float32)
    samples = np.concatenate([noise, np.zeros_like(noise)])
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="MP3", bitrate_mode="VARIABLE")
    assert len(read_audio(file)) == len(samples)
    # As of an encoder that writes into a pipe.
    file.write_bytes(file.read_bytes().replace(b"Xing", bytes(4)))
    with pytest.raises(CorpusError, match="does not say how long it is"):
        decode_through(file)


def test_audio_from_a_pipe(tmp_path: Path) -> None:
    """Who writes to a pipe cannot go back to write the length: WAV then says the highest number, FLAC none."""
    file = tmp_path / "a.wav"
    soundfile.write(file, tiny.tone(1.0, 1), SAMPLE_RATE_HZ)
    data = bytearray(file.read_bytes())
    for at in (4, data.index(b"data") + 4):
        data[at : at + 4] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    assert decode_through(file).duration_s == 1.0
    flac = tmp_path / "a.flac"
    soundfile.write(flac, tiny.tone(1.0, 1), SAMPLE_RATE_HZ)
    data = bytearray(flac.read_bytes())
    # STREAMINFO begins at byte 8; its 36-bit count of samples ends at byte 18 of it.
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    flac.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.flac: its header does not say how long it is"):
        probe(flac)


def test_samples_are_finite_to_the_end(tmp_path: Path) -> None:
    """A segment of good samples in a file that holds others is a fault too: the file goes into the corpus."""
    wave = tiny.tone(10.0, 1)
    wave[-1] = np.inf
    soundfile.write(tmp_path / "a.wav", wave, SAMPLE_RATE_HZ, subtype="FLOAT")
    (fault,) = check_segments(tmp_path, [segment()], max_audio_s=30)
    assert "not finite numbers" in fault


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
