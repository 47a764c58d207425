"""Large blocks: chosen where they are safe, and a row computes the same bits alone, in company and on any threads."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from export.blocks import choose_block, rows_alone
from export.config import PackageConfig
from export.manifest import read_manifest
from export.package import run_package
from export.runtime import open_translator
from tests import tiny

STEPS = 4


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """int4 packages of a model whose widths are multiples of 128, by the blocks asked for; 0 asks for none."""
    folder = tmp_path_factory.mktemp("blocks")
    model = tiny.make_model(folder / "model", hidden_size=256, intermediate_size=768)
    made = {}
    for block in (0, 32):
        config = PackageConfig(
            precision="int4", langs=("de",), quantise="rtn", block_size=block or None
        )
        made[block] = run_package(config, model, None, folder / f"{block}").path
    return made


@pytest.mark.parametrize("block", [0, 32])
def test_a_row_computes_the_same_bits_alone_and_among_others(
    wide: dict[int, Path], block: int
) -> None:
    manifest = read_manifest(wide[block])
    assert manifest.onnx is not None
    assert manifest.onnx["bits"]["block_size"] == (block or 128)
    assert manifest.rows_alone == (block == 0)
    found = {}
    for threads, rows in itertools.product((1, 2), (1, 2, 5, 9)):
        translator = open_translator(wide[block], threads=threads)
        found[threads, rows] = _logits(translator, rows)
        translator.close()
    first = found[1, 1]
    for case, logits in found.items():
        assert np.array_equal(logits, first), case


def _logits(translator, rows: int) -> np.ndarray:
    """Logits of the first row's steps among so many, whose prompts differ in length."""
    generator = np.random.default_rng(0)
    hidden = translator.manifest.decoder.hidden
    batch = translator.open_batch(rows)
    for extra in range(rows):
        prompt = generator.standard_normal((41 + 7 * extra, hidden)).astype(np.float32)
        batch.add(prompt, 100)
    return np.stack(
        [
            batch._run([17 + step] * rows, [row.length + step for row in batch.rows])[0].copy()
            for step in range(STEPS)
        ]
    )


def test_choice() -> None:
    assert choose_block(6e6, [256, 768]) == 128
    assert choose_block(4e9, [4096, 11008]) == 32, "rows share the reading of what no cache holds"
    assert choose_block(6e6, [256, 192]) == 32, "a block that would be padded"
    assert rows_alone({"decoder": 4, "head": 4, "block_size": 64})
    assert rows_alone({"decoder": 8, "head": 4, "block_size": 64})
    assert not rows_alone({"decoder": 8, "head": 8, "block_size": 64})
    assert rows_alone({"decoder": 8, "head": 8, "block_size": 128})
    assert not rows_alone({"decoder": 4, "head": 8, "block_size": 32})
    assert not rows_alone({"decoder": 32, "head": 32, "block_size": 128})
