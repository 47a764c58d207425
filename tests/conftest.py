"""Small real models and corpora on disk, made once a session."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-Audio model of six decoder layers, in float32."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones with German and Chinese texts: 12 train, 6 select, 6 test segments."""
    return tiny.make_corpus(tmp_path_factory.mktemp("corpora") / "tiny")
