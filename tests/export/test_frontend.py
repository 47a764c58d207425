"""The numpy front end equals the stock feature extractor."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from export.frontend import FrontEnd, LogMel, encoder_positions


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("samples", [480, 16_000, 77_777, 479_681, 480_000, 500_000])
def test_equals_the_stock_extractor(mel_bins: int, samples: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    generator = np.random.default_rng(samples)
    time_s = np.arange(samples) / 16_000
    audio = 0.3 * np.sin(2 * np.pi * (300 + 40 * time_s) * time_s) * (time_s % 2 < 1.5)
    audio = (audio + generator.normal(0, 0.01, samples)).astype(np.float32)
    stock = extractor(audio, sampling_rate=16_000, return_attention_mask=True)
    features, valid = FrontEnd(LogMel.from_extractor(extractor))(audio)
    assert valid == stock["attention_mask"][0].sum()
    assert features.shape[1] == min(valid + 4, 3000)
    difference = np.abs(features - stock["input_features"][0][:, : features.shape[1]])
    assert difference.max() < 2e-4


def test_refuses_other_filters() -> None:
    extractor = WhisperFeatureExtractor(feature_size=80)
    extractor.mel_filters = extractor.mel_filters * 2
    with pytest.raises(ValueError, match="mel filters"):
        LogMel.from_extractor(extractor)


def test_positions_are_the_stock_encoder_s() -> None:
    assert [encoder_positions(frames) for frames in (1, 2, 3, 4, 3000)] == [1, 1, 2, 2, 1500]
