"""Small real models and corpora on disk, made once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import tiny

# Many tests hand models tensors of their own, look at threads, or fork. They are of the processor, also beside a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("HALVE_TEST_GPUS", "")

# A machine that others use may stand still for longer than an example is allowed.
settings.register_profile("halve", parent=settings.default, deadline=None)
settings.load_profile("halve")


@pytest.fixture(autouse=True)
def gradient_mode() -> Iterator[None]:
    """A stage that leaves gradients off would break the next one of the same process."""
    yield
    left_off = torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
    assert not left_off, "gradients were left off"


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of what computes in threads, however many cores a test process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-Audio model of six decoder layers, in float32."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones with German and Chinese texts: 12 train, 6 select, 6 test segments."""
    return tiny.make_corpus(tmp_path_factory.mktemp("corpora") / "tiny")
