"""One quality result of small models, shared by the tests of this folder."""

from pathlib import Path

import pytest

from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from tests import tiny


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of fewer layers and other weights than `tiny_model`."""
    return tiny.make_model(
        tmp_path_factory.mktemp("students") / "student", seed=1, num_hidden_layers=4
    )


@pytest.fixture(scope="session")
def quality_result(
    tiny_model: Path,
    tiny_student: Path,
    tiny_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A teacher and a student scored on a stated subset of `test`."""
    out = tmp_path_factory.mktemp("results") / "quality"
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)
    run_quality(config, tiny_model, [tiny_student], tiny_corpus, out)
    return out
