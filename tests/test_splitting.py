"""Long audio is cut at pauses; nothing is lost and nothing comes twice."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.audio import SAMPLE_RATE_HZ
from halve.splitting import FRAME, cut_point, energy_db, stretches


def blocks(samples: np.ndarray, size: int) -> list[np.ndarray]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


@st.composite
def recordings(draw: st.DrawFn) -> np.ndarray:
    """Noise that is louder here and quieter there."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.lists(st.sampled_from([0.0, 1e-4, 0.01, 0.5]), min_size=1, max_size=12))
    parts = [
        generator.normal(0, level, draw(st.integers(1, 12_000))).astype(np.float32)
        for level in levels
    ]
    return np.concatenate(parts)


@settings(max_examples=150, deadline=None)
@given(recordings(), st.floats(0.05, 3.0), st.integers(1, 20_000))
def test_every_sample_lands_in_one_stretch(samples: np.ndarray, window_s: float, size: int) -> None:
    found = list(stretches(blocks(samples, max(size, 400)), window_s))
    assert np.array_equal(np.concatenate([part.samples for part in found]), samples)
    position = 0
    for part in found:
        assert 0 < len(part.samples) <= max(FRAME, window_s * SAMPLE_RATE_HZ)
        assert part.start_s == position / SAMPLE_RATE_HZ
        position += len(part.samples)


@settings(max_examples=50, deadline=None)
@given(recordings(), st.floats(0.1, 2.0))
def test_the_size_of_blocks_does_not_matter(samples: np.ndarray, window_s: float) -> None:
    whole = [part.start_s for part in stretches([samples], window_s)]
    pieces = [part.start_s for part in stretches(blocks(samples, 777), window_s)]
    assert whole == pieces


@settings(max_examples=50, deadline=None)
@given(st.floats(1.1, 1.8), st.floats(0.25, 0.6), st.integers(0, 1000))
def test_a_cut_falls_into_the_pause(at_s: float, length_s: float, seed: int) -> None:
    samples = np.random.default_rng(seed).normal(0, 0.1, 2 * SAMPLE_RATE_HZ).astype(np.float32)
    end_s = min(1.95, at_s + length_s)
    start, end = int(at_s * SAMPLE_RATE_HZ), int(end_s * SAMPLE_RATE_HZ)
    samples[start:end] *= 0.001
    assert start - FRAME <= cut_point(samples) <= end + FRAME


def test_short_audio_stays_whole() -> None:
    samples = np.ones(16_000, np.float32)
    (part,) = stretches([samples[:9_000], samples[9_000:]], 1.0)
    assert part.duration_s == 1.0
    assert not list(stretches([], 1.0))


def test_silence_is_known() -> None:
    loud, quiet = (
        next(stretches([np.full(1600, level, np.float32)], 1.0)) for level in (0.1, 1e-5)
    )
    assert quiet.is_silent
    assert not loud.is_silent


def test_energy_of_a_full_scale_sine_is_minus_three_decibels() -> None:
    time_s = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    energy = energy_db(np.sin(2 * np.pi * 400 * time_s).astype(np.float32))
    assert energy.shape == (50,)
    assert np.allclose(energy, -3.01, atol=0.01)
