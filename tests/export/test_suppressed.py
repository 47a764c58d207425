"""Tokens that the generation config forbids: a package says none of them, as stock `generate` does not."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from export.config import PackageConfig
from export.geometry import Geometry
from export.manifest import read_manifest
from export.package import run_package
from export.parity import top_two_gap
from export.rows import Decoder
from export.runtime import open_translator
from export.vocabulary import Vocabulary
from halve.models import load_model
from halve.translate import TorchTranslator

LIMITS = [12, 9, 14, 4, 12]
GEOMETRY = Geometry(1, 8, 2, 2, 4, 4, 1e-6, 64, (1.0, 0.5))
"""Of a decoder with four logits."""


def _no_embeddings(tokens: Sequence[int]) -> np.ndarray:
    return np.zeros((len(tokens), GEOMETRY.hidden), np.float32)


@pytest.fixture(scope="module")
def forbidden(student: Path, clips: list) -> tuple[set[int], set[int]]:
    """Some of what the student says, and some of what it begins with."""
    rows = TorchTranslator(load_model(student)).translate(clips, "de", limits=LIMITS)
    later = {row.tokens[2] for row in rows if len(row.tokens) > 2}
    return later, {row.tokens[0] for row in rows} - later


@pytest.fixture(scope="module")
def silenced(student: Path, forbidden: tuple[set[int], set[int]], workshop: Path) -> Path:
    """The student with those forbidden."""
    path = workshop / "silenced"
    shutil.copytree(student, path)
    settings = json.loads((path / "generation_config.json").read_text())
    settings["suppress_tokens"] = sorted(forbidden[0])
    settings["begin_suppress_tokens"] = sorted(forbidden[1])
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def package(silenced: Path, tiny_corpus: Path, workshop: Path) -> Path:
    config = PackageConfig(target="onnx", precision="fp32", langs=("de",))
    return run_package(config, silenced, tiny_corpus, workshop / "silenced-onnx").path


def test_a_package_says_what_its_student_may(
    package: Path, silenced: Path, forbidden: tuple[set[int], set[int]], clips: list
) -> None:
    manifest = read_manifest(package)
    assert (manifest.suppressed_ids, manifest.suppressed_first_ids) == tuple(map(sorted, forbidden))
    assert manifest.parity["passed"]
    whole, translator = TorchTranslator(load_model(silenced)), open_translator(package, threads=1)
    expected = whole.translate(clips, "de", limits=LIMITS)
    for batch_size in (1, 2, 16):
        assert translator.translate(clips, "de", limits=LIMITS, batch_size=batch_size) == expected
    assert "".join(translator.stream(clips[1], "de", limit=LIMITS[1])) == expected[1].text
    searched = whole.translate(clips, "de", limits=LIMITS, beams=3)
    assert translator.translate(clips, "de", limits=LIMITS, beams=3) == searched
    for row in [*expected, *searched]:
        assert not forbidden[0] & set(row.tokens) and not forbidden[1] & set(row.tokens[:1])
    for tokens in ([], expected[0].tokens[:2]):
        gap = translator.top_two_gap(clips[0], "de", tokens)
        assert gap == pytest.approx(top_two_gap(whole, clips[0], "de", tokens), abs=1e-3)


def test_rows_that_come_and_go_say_none_of_them(package: Path, silenced: Path, clips: list) -> None:
    expected = TorchTranslator(load_model(silenced)).translate(clips, "de", limits=LIMITS)
    translator = open_translator(package)
    batch = translator.open_batch(2)
    first = batch.add(translator.inputs(clips[0], "de"), LIMITS[0])
    batch.step()
    second = batch.add(translator.inputs(clips[1], "de"), LIMITS[1])
    while batch.rows:
        batch.step()
    assert [first.tokens, second.tokens] == [row.tokens for row in expected[:2]]


def test_a_trimmed_package_says_none_of_them(
    silenced: Path,
    forbidden: tuple[set[int], set[int]],
    clips: list,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    config = PackageConfig(precision="fp32", langs=("de",), trim_vocab=True, force=True)
    path = run_package(config, silenced, tiny_corpus, tmp_path / "p").path
    kept = set(np.load(path / "vocabulary.npy").tolist())
    translator = open_translator(path)
    rows = translator.translate(clips, "de", limits=LIMITS)
    rows += translator.translate(clips, "de", limits=LIMITS, beams=2)
    for row in rows:
        assert set(row.tokens) <= kept - forbidden[0]
        assert not forbidden[1] & set(row.tokens[:1])


def test_a_trimmed_vocabulary_blocks_the_rows_of_tokens_and_no_others() -> None:
    words = Vocabulary(np.array([3, 5, 9, 12]), suppressed=[9, 4, 99], suppressed_first=[3, 0])
    assert words.blocked == ([2], [0])
    decoder = Decoder(GEOMETRY, _no_embeddings, [12], False, words)
    logits = np.array([[4.0, 2.0, 9.0, 1.0]] * 2, np.float32)
    assert decoder.choose(logits.copy(), first=True) == [5, 5]
    assert decoder.choose(logits.copy(), first=False) == [3, 3]


def test_ids_of_no_token_forbid_nothing() -> None:
    words = Vocabulary(suppressed=[-1, 99, 2])
    decoder = Decoder(GEOMETRY, _no_embeddings, [3], False, words)
    assert decoder.choose(np.array([[0.0, 1.0, 9.0, 2.0]], np.float32), first=True) == [3]
