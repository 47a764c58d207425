"""Large blocks: chosen where they are safe, and a row computes the same bits alone, in company and on any threads."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.latency import without_ends
from export.blocks import choose_block, rows_alone
from export.config import PackageConfig
from export.decoding import DecodeBatch, rows_that_agree
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


def test_a_row_in_an_idle_one_s_company_has_the_bits_of_a_pair(wide: dict[int, Path]) -> None:
    translator = open_translator(wide[32], threads=1)
    decoder = translator._decoder
    decoder.row_threads, decoder.least_rows = None, 2
    prompts = np.random.default_rng(3).standard_normal((2, 30, 256)).astype(np.float32)
    pair = translator.open_batch(2)
    for prompt in prompts:
        pair.add(prompt, 100)
    of_pair = pair._run([17, 18], [30, 30]).copy()
    for slots in (1, 2):
        batch = translator.open_batch(slots)
        for cache in batch._caches._arrays:
            cache[1:] = np.nan  # whatever an earlier row left there
        batch.add(prompts[0], 100)
        assert batch.free == slots - 1
        assert np.array_equal(batch._run([17], [30])[0], of_pair[0])
    batch.add(prompts[1], 100)  # into the slot that the idle row wrote to
    assert np.array_equal(batch._run([17, 18], [30, 30]), of_pair)
    translator.close()


def test_beams_that_grow_again_have_their_prompt(wide: dict[int, Path]) -> None:
    """A search that goes on with one beam lets an idle row write beside it."""
    translator = open_translator(wide[32], threads=1)
    decoder = translator._decoder
    decoder.row_threads, decoder.least_rows = None, 2
    steps = []

    def run(first: np.ndarray, step: Callable[..., np.ndarray]) -> SimpleNamespace:
        for beams in (3, 1, 3):
            steps.append(step([17] * beams, [0] * beams).copy())
        return SimpleNamespace(tokens=[17], stopped="end")

    decoder.beam_search = lambda *_: SimpleNamespace(run=run)
    prompt = np.random.default_rng(3).standard_normal((30, 256)).astype(np.float32)
    translator.open_batch(3).search(prompt, 6, 3)
    assert all(np.array_equal(row, logits[0]) for logits in steps for row in logits)
    translator.close()


def test_a_trimmed_package_that_says_no_end_is_opened(tmp_path: Path, tiny_corpus: Path) -> None:
    """As the latency bench times a number of tokens: which kernels there are is found out without an end token."""
    model = tiny.make_model(tmp_path / "model", hidden_size=256, intermediate_size=768)
    config = PackageConfig(
        precision="int4", langs=("de",), quantise="rtn", block_size=32, trim_vocab=True, force=True
    )
    whole = run_package(config, model, tiny_corpus, tmp_path / "package").path
    translator = open_translator(without_ends(whole, tmp_path / "muted", 7), threads=1)
    assert translator._decoder.ends == {-1}
    assert len(translator.translate([tiny.tone(1.0, 0)], "de", limits=[7])[0].tokens) == 7
    translator.close()


@pytest.mark.parametrize(
    "kernels, expected",
    [
        (lambda rows: [0] * rows, 1),
        (lambda rows: [int(rows > 1)] * rows, 2),
        (lambda rows: [1] * (rows - 1) + [rows % 2], None),  # an odd one out
        (lambda rows: [rows > 2] * rows, None),
    ],
)
def test_what_a_processor_s_kernels_ask_for_is_tried(
    wide: dict[int, Path], monkeypatch: pytest.MonkeyPatch, kernels, expected: int | None
) -> None:
    translator = open_translator(wide[32], threads=1)
    truly = DecodeBatch._run

    def run(batch: DecodeBatch, tokens: list[int], lengths: list[int]) -> np.ndarray:
        shape = truly(batch, tokens, lengths).shape
        return np.broadcast_to(np.array(kernels(len(tokens)), np.float32)[:, None], shape)

    monkeypatch.setattr(DecodeBatch, "_run", run)
    assert rows_that_agree(translator._decoder) == expected
    translator.close()


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
