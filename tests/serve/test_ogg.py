"""Ogg files are looked over before a decoder may search through them; good ones are heard whole."""

import io
import struct
import subprocess
import tempfile
import time

import numpy as np
import pytest
import soundfile

from serve import ffmpeg, ogg
from serve.audio_input import Recording
from serve.errors import ApiError
from tests import tiny


def encoded(seconds: float, subtype: str, rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    frames = int(seconds * rate)
    samples = np.random.default_rng(0).normal(0, 0.1, (frames, channels)).astype(np.float32)
    soundfile.write(file, samples, rate, format="OGG", subtype=subtype)
    return file.getvalue()


def heard_s(content: bytes, max_audio_s: float = 60.0) -> tuple[float, float]:
    """(decoded, claimed) seconds."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        recording = Recording(file, max_audio_s)
        for _ in recording.blocks():
            pass
        return recording.decoded_s, recording.duration_s


def refusal(content: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        heard_s(content)
    return caught.value


def page(body: bytes, granule: int = -1, serial: int = 77) -> bytes:
    """A page with the right checksum; its body is a multiple of 255 bytes."""
    segments = len(body) // 255
    head = b"OggS\0\0" + struct.pack("<qIII", granule, serial, 9, 0) + bytes([segments])
    made = head + b"\xff" * segments + body
    return made[:22] + struct.pack("<I", ogg.checksum(made)) + made[26:]


FALSE_PAGE = b"OggS\0" + b"\xff" * 22
"""Looks like the beginning of a page of 65 kB, which a decoder would sum up to know better."""


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_file_made_to_be_searched_is_refused_at_once(subtype: str) -> None:
    content = encoded(1.0, subtype) + FALSE_PAGE * 150_000
    began_s = time.process_time()
    error = refusal(content)
    assert (error.status, error.code) == (422, "invalid_audio")
    # libsndfile alone takes 1.4 s for each of these 4 MB.
    assert time.process_time() - began_s < 1.5


def test_damage_hidden_in_pages_of_the_right_size_is_refused() -> None:
    filled = (FALSE_PAGE * 2_500)[: 255 * 255]
    good = page(filled)
    bad = good[:22] + bytes(4) + good[26:]
    assert refusal(encoded(1.0, "OPUS") + bad * 60).code == "invalid_audio"


def test_bytes_between_pages_and_wrong_ones_are_refused() -> None:
    content = encoded(2.0, "OPUS")
    start = content.rindex(b"OggS")
    assert refusal(content[:start] + bytes(10) + content[start:]).code == "invalid_audio"
    changed = bytearray(content)
    changed[start - 1] ^= 1
    assert refusal(bytes(changed)).code == "invalid_audio"


def test_absurdly_many_pages_or_recordings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(0.5, "OPUS")
    assert refusal(content + page(b"") * 8_000).code == "invalid_audio"
    monkeypatch.setattr(ogg, "MOST_LINKS", 3)
    assert heard_s(content * 3)[0] == pytest.approx(1.5)
    assert refusal(content * 4).code == "invalid_audio"


def test_a_file_that_the_end_cuts_is_heard_up_to_there() -> None:
    content = encoded(10.0, "OPUS")
    decoded_s, _ = heard_s(content[: len(content) // 2])
    assert 3.0 < decoded_s < 6.0


def test_all_recordings_of_a_chain_are_heard() -> None:
    parts = [("OPUS", 16_000, 1), ("VORBIS", 44_100, 2), ("OPUS", 48_000, 2)]
    chain = b"".join(encoded(2.0, *part) for part in parts)
    assert heard_s(chain) == (pytest.approx(6.0), pytest.approx(6.0))
    with pytest.raises(ApiError, match="longer"):
        heard_s(chain, max_audio_s=5.0)


@pytest.mark.skipif(ffmpeg.find_ffmpeg() is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("options", [[], ["-page_duration", "20000"], ["-page_duration", "1"]])
@pytest.mark.parametrize("codec", ["libopus", "libvorbis"])
def test_what_ffmpeg_writes_is_read(codec: str, options: list[str]) -> None:
    source = io.BytesIO()
    soundfile.write(source, tiny.tone(3.0, 0), 16_000, format="WAV")
    command = [str(ffmpeg.find_ffmpeg()), "-v", "error", "-f", "wav", "-i", "pipe:0", "-c:a", codec]
    made = subprocess.run(
        [*command, *options, "-f", "ogg", "pipe:1"],
        input=source.getvalue(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert heard_s(made)[0] == pytest.approx(3.0, abs=0.1)
    assert heard_s(made * 2)[0] == pytest.approx(6.0, abs=0.2)


def test_looking_stops_when_asked() -> None:
    def enough() -> None:
        raise ApiError(504, "enough")

    with tempfile.TemporaryFile() as file:
        file.write(encoded(1.0, "OPUS"))
        file.flush()
        with pytest.raises(ApiError, match="enough"):
            ogg.links(file.fileno(), 60.0, enough)
