"""m4a, webm and aac through ffmpeg, where it is installed.

The upload goes in as the process's standard input and samples come out of a pipe: ffmpeg is told
the container, may open nothing else, writes no file, and is stopped at the length that is allowed.
"""

import contextlib
import os
import resource
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from halve.audio import SAMPLE_RATE_HZ
from halve.environment import find_ffmpeg
from serve.errors import ApiError, bad_audio

DEMUXERS = {"mp4": "mov", "webm": "matroska", "aac": "aac"}
"""Containers left to ffmpeg, and its names for them. Naming one keeps playlists and other formats
that refer to further files out of reach."""
CHUNK_BYTES = 4 * SAMPLE_RATE_HZ
POLL_S = 0.2
STALL_S = 20.0
"""A process that gives no sample for so long is taken for stuck: it would keep a reader busy."""
MEMORY_BYTES = 2 * 1024**3


def command(program: str, container: str, max_audio_s: float) -> list[str]:
    """The command line; samples leave as 16 kHz mono float32."""
    limits = ["-max_alloc", str(MEMORY_BYTES // 4), "-protocol_whitelist", "file"]
    # Through /dev/stdin the file protocol can seek, which m4a with its index at the end needs.
    source = ["-f", DEMUXERS[container], "-i", "file:/dev/stdin"]
    sink = ["-map", "0:a:0", "-vn", "-sn", "-dn", "-ac", "1", "-ar", str(SAMPLE_RATE_HZ)]
    length = ["-t", f"{max_audio_s + 1:.1f}", "-f", "f32le", "pipe:1"]
    return [program, "-nostdin", "-v", "quiet", "-threads", "1", *limits, *source, *sink, *length]


def blocks(
    file: BinaryIO, container: str, max_audio_s: float, check: Callable[[], None]
) -> Iterator[NDArray[np.float32]]:
    """Decodes an open file, see `serve.audio_input.Recording.blocks`.

    Raises:
        ApiError: ffmpeg is not installed, or cannot read the file.
    """
    program = find_ffmpeg()
    if program is None:
        raise ApiError(
            422,
            f"This server reads no {container} files (ffmpeg is not installed there). "
            "Send WAV, FLAC, Ogg Opus or MP3.",
            param="file",
            code="unsupported_format",
        )
    process = subprocess.Popen(
        command(program, container, max_audio_s),
        stdin=file.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.defpath},
        start_new_session=True,  # Ctrl-C is the server's, which lets running requests end
    )
    try:
        _confine(process.pid)
        yield from _samples(process, check)
        if process.wait() != 0:
            raise bad_audio("The audio file is damaged or holds no sound, and cannot be decoded.")
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _confine(pid: int) -> None:
    """Bounds a process's memory, and lets it write no file."""
    limits = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: 0}
    for limit, most in limits.items():
        with contextlib.suppress(OSError, AttributeError):
            resource.prlimit(pid, limit, (most, most))


def _samples(
    process: "subprocess.Popen[bytes]", check: Callable[[], None]
) -> Iterator[NDArray[np.float32]]:
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    poll = select.poll()  # select() knows no descriptors from 1,024 on
    poll.register(descriptor, select.POLLIN)
    until_s = time.monotonic() + STALL_S
    while True:
        check()
        if not poll.poll(1000 * POLL_S):
            if time.monotonic() > until_s:
                raise bad_audio("The audio file cannot be decoded in reasonable time.")
            continue
        until_s = time.monotonic() + STALL_S
        data = os.read(descriptor, CHUNK_BYTES)
        if not data:
            return
        data = rest + data
        whole = len(data) // 4 * 4
        rest = data[whole:]
        if whole:
            yield np.frombuffer(data[:whole], dtype="<f4").astype(np.float32)
