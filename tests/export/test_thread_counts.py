"""Bits do not depend on the number of threads, whatever a product's rows: onnxruntime deals them out by 128."""

from pathlib import Path

import numpy as np
import pytest

from export.blocks import leaves_one
from export.config import PackageConfig
from export.frontend import encoder_positions, valid_frames
from export.package import run_package
from export.runtime import open_translator
from tests import tiny

HOP = 160


@pytest.fixture(scope="module", params=[32, 128])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    model = tiny.make_model(folder / "model", hidden_size=256, intermediate_size=768)
    config = PackageConfig(
        precision="int4", langs=("de",), quantise="rtn", block_size=request.param, encoder_bits=4
    )
    return run_package(config, model, None, folder / "package").path


def test_a_tile_of_one_row() -> None:
    assert [rows for rows in range(400) if leaves_one(rows)] == [129, 257, 385]


@pytest.mark.parametrize("positions", [129, 130, 257])
def test_prompts(package: Path, positions: int) -> None:
    prompt = np.random.default_rng(0).standard_normal((positions, 256)).astype(np.float32)
    found = []
    for threads, rows in ((1, 1), (2, 1), (2, 3)):
        translator = open_translator(package, threads=threads)
        batch = translator.open_batch(rows)
        for _ in range(rows - 1):
            batch.add(prompt[:40], 100)
        first = batch.logits_after(prompt).copy()
        batch.add(prompt, 100)
        tokens, lengths = [17] * rows, [row.length for row in batch.rows]
        found.append((first, batch._run(tokens, lengths)[-1].copy()))
        translator.close()
    for first, later in found[1:]:
        assert np.array_equal(first, found[0][0])
        assert np.array_equal(later, found[0][1])


@pytest.mark.parametrize("positions", [129, 258, 259])
def test_audio(package: Path, positions: int) -> None:
    """Lengths at which the encoder's positions, or those that are left of them after pooling, leave one row."""
    samples = tiny.tone(positions * 2 * HOP / 16_000, 3)[: positions * 2 * HOP]
    inputs = []
    for threads in (1, 2):
        translator = open_translator(package, threads=threads)
        front = translator.manifest.front_end
        assert encoder_positions(valid_frames(len(samples), front)) == positions
        inputs.append(translator.inputs(samples, "de"))
        translator.close()
    assert np.array_equal(*inputs)
