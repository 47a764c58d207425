"""Uploads may hold anything; what is not audio is refused and what is audio is heard as it is."""

import io
import os
import resource
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.audio import read_audio
from halve.splitting import stretches
from serve import ffmpeg, headers, ogg
from serve.audio_input import Recording, sniff
from serve.errors import ApiError
from tests import tiny
from tests.serve.conftest import wav


def decode(content: bytes, max_audio_s: float = 60.0) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        blocks = list(Recording(file, max_audio_s).blocks())
    return np.concatenate(blocks)


def refusal(content: bytes, max_audio_s: float = 60.0) -> ApiError:
    with pytest.raises(ApiError) as caught:
        decode(content, max_audio_s)
    return caught.value


def encoded(samples: np.ndarray, rate: int = 16_000, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("rate", "channels", "options"),
    [
        (16_000, 1, {"format": "WAV", "subtype": "PCM_16"}),
        (8_000, 1, {"format": "WAV", "subtype": "PCM_U8"}),
        (44_100, 2, {"format": "WAV", "subtype": "PCM_24"}),
        (48_000, 6, {"format": "FLAC", "subtype": "PCM_24"}),
        (48_000, 2, {"format": "OGG", "subtype": "OPUS"}),
        (44_100, 1, {"format": "OGG", "subtype": "VORBIS"}),
        (22_050, 1, {"format": "MP3", "subtype": "MPEG_LAYER_III"}),
        (32_000, 1, {"format": "AIFF", "subtype": "PCM_16"}),
        (16_000, 1, {"format": "AU", "subtype": "FLOAT"}),
    ],
)
def test_heard_as_the_rest_of_halve_hears_it(
    rate: int, channels: int, options: dict[str, str], tmp_path: Path
) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (rate * 5 // 2, channels))
    content = encoded(samples.astype(np.float32), rate, **options)
    path = tmp_path / "audio"
    path.write_bytes(content)
    heard = read_audio(path)
    # The MP3 decoder rounds the last bit differently from block to block.
    tolerance = 1e-6 if options["format"] == "MP3" else 0.0
    assert np.allclose(decode(content), heard, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_audio"),
        (b"RIFF", "invalid_audio"),
        (b"this is a text file, whatever its name says", "invalid_audio"),
        (b"%PDF-1.7 ...", "invalid_audio"),
        (b"RIFF\x00\x00\x00\x00WAVE", "invalid_audio"),
        (b"fLaC" + bytes(500), "invalid_audio"),
        (b"OggS" + bytes(500), "invalid_audio"),
        (b"ID3" + b"\xff" * 500, "invalid_audio"),
        (wav(0.5)[:44], "empty_audio"),
    ],
)
def test_what_is_not_audio_is_refused(content: bytes, code: str) -> None:
    error = refusal(content)
    assert (error.status, error.code) == (422, code)


def wav_header(channels: int, rate: int, data_bytes: int, bits: int = 16) -> bytes:
    frame = min(65_535, channels * bits // 8)
    kind = 3 if bits == 32 else 1
    rates = (rate, min(2**32 - 1, rate * frame))
    facts = struct.pack("<IHHIIHH", 16, kind, channels, *rates, frame, bits)
    return b"RIFF\xff\xff\xff\xffWAVEfmt " + facts + b"data" + struct.pack("<I", data_bytes)


@pytest.mark.parametrize(
    ("channels", "rate"), [(65_535, 16_000), (0, 16_000), (17, 16_000), (1, 1), (1, 2**31 - 1)]
)
def test_absurd_headers_are_refused(channels: int, rate: int) -> None:
    assert refusal(wav_header(channels, rate, 2**31) + bytes(4_000)).status == 422


@pytest.mark.parametrize("channels", [2**31 - 1, 2**31, 2**32 - 1, 1_024, 0])
def test_formats_whose_headers_can_name_billions_of_channels(channels: int) -> None:
    header = b".snd" + struct.pack(">IIIII", 24, 0xFFFFFFFF, 3, 16_000, channels)
    assert refusal(header + bytes(4_000)).status == 422


def test_a_header_that_promises_more_than_there_is() -> None:
    content = wav_header(1, 16_000, 20 * 32_000) + bytes(32_000)
    assert len(decode(content)) == 16_000


def test_a_header_that_promises_too_much_is_refused_unread() -> None:
    flac = bytearray(encoded(np.zeros(16_000, np.float32), format="FLAC"))
    # The low 32 bits of STREAMINFO's total of samples.
    flac[22:26] = struct.pack(">I", 2**32 - 1)
    assert refusal(bytes(flac)).code == "audio_too_long"


def unknown_length(flac: bytes) -> bytes:
    """A FLAC file whose header counts no samples, as every encoder that streams writes it."""
    content = bytearray(flac)
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    return bytes(content)


def test_streamed_flac_is_read() -> None:
    flac = encoded(tiny.tone(3.0, 0), format="FLAC")
    assert np.array_equal(decode(unknown_length(flac)), decode(flac))


def test_a_bomb_is_stopped_at_the_limit() -> None:
    silence = encoded(np.zeros(16_000 * 200, np.float32), format="FLAC")
    assert len(silence) < 20_000
    assert refusal(unknown_length(silence), max_audio_s=100).code == "audio_too_long"


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    peaks = []
    for minutes in (2, 20):
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", 16_000, 1) as file:
            for minute in range(minutes):
                file.write(tiny.tone(60.0, minute))
        tracemalloc.start()
        with path.open("rb") as file:
            cut = [each.duration_s for each in stretches(Recording(file, 3600.0).blocks(), 30.0)]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(cut) == pytest.approx(60.0 * minutes)
        assert max(cut) <= 30.0
    assert peaks[1] < 1.2 * peaks[0], peaks


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_numbers(value: float) -> None:
    samples = tiny.tone(1.0, 0)
    samples[9_000] = value
    assert refusal(encoded(samples, format="WAV", subtype="FLOAT")).status == 422


def lengths(content: bytes) -> tuple[float, float]:
    """(decoded, claimed) seconds."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        recording = Recording(file, 60.0)
        for _ in recording.blocks():
            pass
        return recording.decoded_s, recording.duration_s


@pytest.mark.parametrize(
    "options",
    [
        {"format": "WAV"},
        {"format": "WAV", "subtype": "IMA_ADPCM"},
        {"format": "WAV", "endian": "BIG"},
        {"format": "AIFF"},
        {"format": "AU"},
        {"format": "MP3"},
    ],
)
def test_files_cut_in_half_say_so(options: dict[str, str]) -> None:
    content = encoded(tiny.tone(20.0, 0), **options)
    assert lengths(content)[1] == pytest.approx(20.0, abs=0.1)
    decoded_s, claimed_s = lengths(content[: len(content) // 2])
    assert decoded_s == pytest.approx(10.0, abs=0.4)
    assert claimed_s == pytest.approx(20.0, abs=0.1)


def mp3(seconds: float, rate: int = 16_000, seed: int = 0) -> bytes:
    return encoded(tiny.tone(seconds, seed), rate, format="MP3")


def silent_about_its_length(content: bytes) -> bytes:
    """An MP3 whose first frame is as of an encoder that writes into a pipe."""
    return content.replace(b"Xing", bytes(4), 1).replace(b"Info", bytes(4), 1)


ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
ID3V2 = b"ID3\4\0\0" + bytes([0, 2, 25, 32]) + b"\xff\xfb" * 18_000
APE = b"APETAGEX" + struct.pack("<II", 2000, 40_000) + bytes(40_016)


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (mp3(3.0) + mp3(2.0, seed=1), 5.0),
        (mp3(1.0) * 30, 30.0),
        # Another rate, more channels, tags between and behind.
        (mp3(3.2) + mp3(2.0, 22_050), 3.2 + 32_000 / 22_050),
        (mp3(3.0) + encoded(np.zeros((32_000, 2), np.float32), format="MP3"), 5.0),
        (mp3(3.0) + ID3V1 + ID3V2 + mp3(2.0) + APE + ID3V1, 5.0),
        (mp3(3.0) + APE + mp3(2.0) + APE, 5.0),
        # Those that say no length, before one that does or behind it.
        (silent_about_its_length(mp3(3.0)) + mp3(2.0), 5.0),
        (silent_about_its_length(mp3(3.0)) + mp3(2.0, 8_000), 7.0),
        (mp3(3.0) + silent_about_its_length(mp3(2.0)), 5.0),
        (silent_about_its_length(mp3(3.0))[:-50], 3.0),
    ],
)
def test_mp3_files_in_a_row_are_heard_to_the_last(content: bytes, seconds: float) -> None:
    decoded_s, claimed_s = lengths(content)
    # Where no length is said the encoder's padding is heard, too.
    assert decoded_s == pytest.approx(seconds, abs=0.3)
    assert claimed_s == decoded_s


def test_mp3_files_in_a_row_are_heard_as_each_alone() -> None:
    first, second = mp3(3.0), mp3(2.0, 22_050, seed=1)
    alone = np.concatenate([decode(first), decode(second)])
    assert np.array_equal(decode(first + second), alone)


@pytest.mark.parametrize("loud_first", [True, False])
def test_an_mp3_of_uneven_frames_that_says_no_length(loud_first: bool) -> None:
    """A length guessed from its first frames would be a third of the true one, or three times as much."""
    loud = np.random.default_rng(0).normal(0, 0.3, 160_000).astype(np.float32)
    halves = [loud, np.zeros(160_000, np.float32)]
    samples = np.concatenate(halves if loud_first else halves[::-1])
    content = encoded(samples, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    decoded_s, claimed_s = lengths(silent_about_its_length(content))
    assert decoded_s == claimed_s == pytest.approx(20.0, abs=0.2)


@pytest.mark.parametrize("kind", ["MP3", "FLAC"])
def test_what_a_decoder_leaves_over_is_not_covered(kind: str) -> None:
    content = encoded(tiny.tone(5.0, 0), format=kind)
    rest = content if kind == "FLAC" else bytes(len(content))
    decoded_s, claimed_s = lengths(content + rest)
    assert decoded_s == 5.0
    assert claimed_s == pytest.approx(10.0, abs=0.2)
    assert lengths(content + ID3V1) == (5.0, 5.0)


def test_an_mp3_cut_off_before_another_says_so() -> None:
    decoded_s, claimed_s = lengths(mp3(20.0)[:20_000] + mp3(2.0))
    assert 6.0 < decoded_s < 8.0
    assert claimed_s == pytest.approx(20.0)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_flac_that_was_cut_off_is_heard_to_there(rate: int) -> None:
    content = encoded(tiny.tone(20.0, 0), format="FLAC", rate=rate)
    whole_s = 20.0 * 16_000 / rate
    half = content[: len(content) // 2]
    decoded_s, claimed_s = lengths(half)
    assert whole_s / 2 - 1.1 < decoded_s < whole_s / 2 + 0.1
    assert claimed_s == pytest.approx(whole_s)
    # Nothing would tell that the rest is missing, or where the damage is.
    assert "is damaged" in str(refusal(unknown_length(half)))
    damaged = half + bytes(500) + content[len(half) + 500 :]
    assert "is damaged" in str(refusal(damaged))


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_lengths_of_streamed_wav_are_not_believed(size: int) -> None:
    content = wav_header(1, 16_000, size) + bytes(64_000)
    if size:
        assert lengths(content) == (2.0, 2.0)
    else:
        assert refusal(content).code == "empty_audio"


def test_decoding_stops_when_asked() -> None:
    def enough() -> None:
        raise ApiError(504, "enough")

    with tempfile.TemporaryFile() as file:
        file.write(wav(3.0))
        file.flush()
        with pytest.raises(ApiError, match="enough"):
            list(Recording(file, 60.0, check=enough).blocks())


GOOD = {
    "wav": wav(0.3),
    "float": encoded(tiny.tone(0.3, 0), format="WAV", subtype="FLOAT"),
    "flac": encoded(tiny.tone(0.3, 0), format="FLAC"),
    "opus": encoded(tiny.tone(0.3, 0), format="OGG", subtype="OPUS"),
    "mp3": encoded(tiny.tone(0.3, 0), format="MP3"),
    "aiff": encoded(tiny.tone(0.3, 0), format="AIFF"),
    "au": encoded(tiny.tone(0.3, 0), format="AU"),
}


FROM_WAV = (str(ffmpeg.find_ffmpeg()), "-v", "error", "-f", "wav", "-i", "pipe:0")


def with_checksums(content: bytearray) -> bytearray:
    """An Ogg file's pages made right again, as far as they can be followed."""
    place = 0
    while content[place : place + 4] == b"OggS" and place + 27 <= len(content):
        segments = content[place + 27 : place + 27 + content[place + 26]]
        size = 27 + len(segments) + sum(segments)
        content[place + 22 : place + 26] = bytes(4)
        found = ogg.checksum(bytes(content[place : place + size]))
        content[place + 22 : place + 26] = found.to_bytes(4, "little")
        place += size
    return content


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    st.integers(0, 2**16),
)
def test_damage_is_decoded_or_refused(
    name: str, changes: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(GOOD[name])
    # Headers most of all, and anywhere.
    reach = min(len(content), 300) if length % 2 else len(content)
    for position, value in changes:
        content[position % reach] = value
    # So that the decoder sees the damage, and not only the check before it.
    if name == "opus" and length % 3:
        content = with_checksums(content)
    content = content[: max(12, length)]
    try:
        samples = decode(bytes(content), max_audio_s=5.0)
    except ApiError as error:
        assert error.status == 422
    else:
        assert np.isfinite(samples).all()
        assert len(samples) <= 5.02 * 16_000


@settings(max_examples=300)
@given(st.binary(max_size=40))
def test_sniffing_anything(head: bytes) -> None:
    assert sniff(head) in {None, "wav", "aiff", "mp4", "flac", "au", "webm", "ogg", "mp3", "aac"}


def test_without_ffmpeg_m4a_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "find_ffmpeg", lambda: None)
    error = refusal(b"\x00\x00\x00\x20ftypM4A " + bytes(100))
    assert error.code == "unsupported_format"
    assert "ffmpeg" in error.message


def test_an_ffmpeg_that_gives_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(ffmpeg, "find_ffmpeg", lambda: str(stuck))
    monkeypatch.setattr(ffmpeg, "STALL_S", 0.3)
    assert refusal(b"\x00\x00\x00\x20ftypM4A " + bytes(100)).code == "invalid_audio"


def test_ffmpeg_is_read_however_many_descriptors_are_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "samples"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"open({str(tmp_path / 'group')!r}, 'w').write(str(os.getpgrp()))\n"
        "sys.stdout.buffer.write(bytes(8))\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(ffmpeg, "find_ffmpeg", lambda: str(program))
    monkeypatch.setattr(ffmpeg, "_confine", lambda pid: None)
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with open(os.devnull, "rb") as file:
            (block,) = ffmpeg.blocks(file, "aac", 10.0, lambda: None)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert block.tolist() == [0.0, 0.0]
    # Ctrl-C goes to the server's own group.
    assert int((tmp_path / "group").read_text()) != os.getpgrp()


def test_ffmpeg_may_write_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "filled"
    writer = tmp_path / "writer"
    writer.write_text(f"#!/bin/sh\nsleep 0.5\nhead -c 4000 /dev/zero > {target}\nexit 1\n")
    writer.chmod(0o700)
    monkeypatch.setattr(ffmpeg, "find_ffmpeg", lambda: str(writer))
    assert refusal(b"\x00\x00\x00\x20ftypM4A " + bytes(100)).status == 422
    assert not target.exists() or target.stat().st_size == 0


@pytest.mark.skipif(ffmpeg.find_ffmpeg() is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("content", [b"\x00\x00\x00\x20ftypM4A " + bytes(100), b"\x1a\x45\xdf\xa3"])
def test_ffmpeg_refuses_damage(content: bytes) -> None:
    assert refusal(content).status == 422


@pytest.mark.skipif(ffmpeg.find_ffmpeg() is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.aac"])
def test_what_ffmpeg_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    codec = ["-c:a", "libopus"] if name == "a.webm" else []
    arguments = [*FROM_WAV, *codec, str(path)]
    subprocess.run(arguments, input=wav(2.0), check=True)
    assert abs(len(decode(path.read_bytes())) - 32_000) < 4_000
    assert refusal(path.read_bytes(), max_audio_s=1.0).code == "audio_too_long"


@pytest.mark.skipif(ffmpeg.find_ffmpeg() is None, reason="ffmpeg is not installed")
def test_m4a_that_was_cut_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    index_first = ["-movflags", "+faststart", str(path)]
    arguments = [*FROM_WAV, *index_first]
    subprocess.run(arguments, input=wav(20.0), check=True)
    content = path.read_bytes()
    assert lengths(content) == (pytest.approx(20.0, abs=0.2), pytest.approx(20.0, abs=0.2))
    decoded_s, claimed_s = lengths(content[: len(content) // 2])
    assert decoded_s < 15.0
    assert claimed_s == pytest.approx(20.0, abs=0.2)


@pytest.mark.skipif(ffmpeg.find_ffmpeg() is None, reason="ffmpeg is not installed")
def test_the_length_of_a_film_is_that_of_its_sound(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    picture = ["-f", "lavfi", "-i", "color=size=32x32:duration=6:rate=5"]
    arguments = [str(ffmpeg.find_ffmpeg()), "-v", "error", *picture, "-f", "wav", "-i", "pipe:0"]
    subprocess.run([*arguments, str(path)], input=wav(2.0), check=True)
    assert lengths(path.read_bytes())[1] == pytest.approx(2.0, abs=0.2)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"moov", b"RIFF"]))
def test_headers_of_anything(content: bytes, kind: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(struct.pack(">I", 200) + kind + content)
        file.flush()
        assert headers.mp4_audio_s(file.fileno()) >= 0.0
        for container in ("wav", "aiff", "au"):
            assert 0.0 <= headers.found_share(file.fileno(), container) <= 1.0
