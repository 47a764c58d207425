"""Ogg Opus by opusenc (Debian package opus-tools): small, quick, and the same bytes each time.

libsndfile could encode as well, at six times the cost and with a stream serial number drawn by
chance; opusenc takes the serial number as an option. Decoding is left to halve.audio.
"""

from __future__ import annotations

import hashlib
import subprocess

import numpy as np
import numpy.typing as npt

from halve.audio import SAMPLE_RATE_HZ

BITRATE_KBITS = 16  # nominal; speech comes to about 20 kbit/s with the container
COMPLEXITY = 5


def encode(samples: npt.NDArray[np.float32], name: str) -> bytes:
    """Ogg Opus of mono samples (frames,) in [-1, 1] at 16 kHz; `name` settles the serial number.

    Raises subprocess.CalledProcessError if opusenc fails.
    """
    pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    serial = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") >> 1
    command = ["opusenc", "--quiet", "--bitrate", str(BITRATE_KBITS), "--comp", str(COMPLEXITY)]
    command += ["--serial", str(serial), "--padding", "0", "--discard-comments", "--raw"]
    command += ["--raw-rate", str(SAMPLE_RATE_HZ), "--raw-chan", "1", "--raw-bits", "16", "-", "-"]
    done = subprocess.run(command, input=pcm.tobytes(), check=True, capture_output=True)
    return bytes(done.stdout)
