"""Log-mel features in numpy: what WhisperFeatureExtractor computes, for valid frames only.

The stock extractor pads every clip to 30 s with silence. The frames of that padding hold a constant
(the floor of the clamp), so only a margin of them is needed: as many as the encoder's convolutions
look ahead. A package translates with this file, numpy and onnxruntime alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

POWER_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0
# Two convolutions of width 3, the second with stride 2, see two frames past the last one.
MARGIN_FRAMES = 4


@dataclass(frozen=True)
class LogMel:
    """The parameters of a Whisper front end."""

    mel_bins: int
    sample_rate_hz: int = 16_000
    fft_size: int = 400
    hop_samples: int = 160
    max_frames: int = 3000
    max_frequency_hz: float = 8000.0

    @classmethod
    def from_extractor(cls, extractor: Any) -> "LogMel":
        """The parameters of a transformers WhisperFeatureExtractor.

        Raises:
            ValueError: its mel filters are not the ones these parameters give.
        """
        found = cls(
            mel_bins=int(extractor.feature_size),
            sample_rate_hz=int(extractor.sampling_rate),
            fft_size=int(extractor.n_fft),
            hop_samples=int(extractor.hop_length),
            max_frames=int(extractor.nb_max_frames),
        )
        filters = np.asarray(extractor.mel_filters, dtype=np.float64)
        expected = mel_filters(found)
        if filters.shape != expected.shape or not np.allclose(filters, expected, atol=1e-7):
            raise ValueError("mel filters other than Whisper's (Slaney scale, 0 to 8000 Hz)")
        return found


def _hertz_to_mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = hertz * 3.0 / 200.0
    logarithmic = 15.0 + np.log(np.maximum(hertz, 1.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(hertz >= 1000.0, logarithmic, linear)


def _mel_to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mel * 200.0 / 3.0
    return np.where(mel >= 15.0, 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15.0)), linear)


def mel_filters(front: LogMel) -> NDArray[np.float64]:
    """Triangular filters on Slaney's mel scale, each of area one; shape (fft_size / 2 + 1, mels)."""
    bins_hz = np.linspace(0.0, front.sample_rate_hz / 2, front.fft_size // 2 + 1)
    highest = _hertz_to_mel(np.array([front.max_frequency_hz]))[0]
    edges_hz = _mel_to_hertz(np.linspace(0.0, highest, front.mel_bins + 2))
    widths = np.diff(edges_hz)
    slopes = edges_hz[None, :] - bins_hz[:, None]
    rising = -slopes[:, :-2] / widths[:-1]
    falling = slopes[:, 2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters: NDArray[np.float64] = triangles * (2.0 / (edges_hz[2:] - edges_hz[:-2]))
    return filters


def valid_frames(samples: int, front: LogMel) -> int:
    """How many frames of so many samples hold audio (the extractor's attention mask)."""
    return min(-(-samples // front.hop_samples), front.max_frames)


def encoder_positions(frames: int) -> int:
    """Positions between the encoder's convolutions (stride 2) and its pooling."""
    return (frames - 1) // 2 + 1


class FrontEnd:
    """Computes features; its filters and window are made once."""

    def __init__(self, front: LogMel) -> None:
        self.front = front
        self._filters = mel_filters(front).astype(np.float32)
        phase = 2.0 * np.pi * np.arange(front.fft_size) / front.fft_size
        self._window = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)

    def __call__(self, audio: FloatArray) -> tuple[FloatArray, int]:
        """Log-mel features of one clip.

        Args:
            audio: samples, shape (samples,); what lies beyond `max_frames` is cut off.

        Returns:
            features, shape (mels, frames), valid frames and a margin; and the count of valid frames.
        """
        front = self.front
        audio = np.asarray(audio[: front.max_frames * front.hop_samples], dtype=np.float32)
        valid = valid_frames(len(audio), front)
        frames = min(valid + MARGIN_FRAMES, front.max_frames)
        power = self._power(audio, frames)
        mel = np.log10(np.maximum(power @ self._filters, POWER_FLOOR))
        mel = np.maximum(mel, mel.max() - DYNAMIC_RANGE)
        return np.ascontiguousarray(((mel + 4.0) / 4.0).T, dtype=np.float32), valid

    def _power(self, audio: FloatArray, frames: int) -> FloatArray:
        """Power spectrum of `frames` frames, the audio followed by silence; (frames, bins)."""
        front = self.front
        half = front.fft_size // 2
        whole = front.max_frames * front.hop_samples
        length = min(frames * front.hop_samples + half, whole)
        padded = np.zeros(length, dtype=np.float32)
        padded[: len(audio)] = audio[:length]
        # Only at 30 s does the right edge of the padded clip come into view.
        right = half if length == whole else 0
        padded = np.pad(padded, (half, right), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, front.fft_size)
        spectrum = np.fft.rfft(windows[:: front.hop_samples][:frames] * self._window, axis=1)
        power: FloatArray = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        return power
