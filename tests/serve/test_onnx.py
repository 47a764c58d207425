"""An ONNX package behind the server: rows join and leave, and no text changes."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import resident_memory_bytes
from export.config import PackageConfig
from export.package import run_package
from export.runtime import open_translator
from halve.audio import decode_audio
from serve.registry import _return_memory
from serve.settings import ServeSettings
from tests.serve.conftest import eventually, serving, wav

CLIENTS = 8


@pytest.mark.parametrize("reserve", [False, True])
def test_texts_do_not_depend_on_the_company(
    tiny_model: Path, tmp_path: Path, reserve: bool
) -> None:
    package = tmp_path / "onnx"
    config = PackageConfig(target="onnx", precision="fp32", langs=("de", "zh"), force=True)
    run_package(config, tiny_model, None, package)
    files = [wav(0.4 + index * 0.3, index) for index in range(2 * CLIENTS)]
    langs = ["de", "zh"] * CLIENTS
    expected = _offline(package, files, langs)
    settings = ServeSettings(models=(str(package),), threads=1, batch_size=6, reserve=reserve)
    with serving(settings) as server:

        def ask(index: int) -> str:
            stream = {"stream": "true"} if index % 3 == 0 else {}
            fields = {"model": "onnx", "to_language": langs[index], **stream}
            answer = server.post(files[index], **fields)
            if not stream:
                return str(answer.json()["text"])
            *_, done = [line for line in answer.text.splitlines() if line]
            return str(json.loads(done.removeprefix("data: "))["text"])

        with ThreadPoolExecutor(CLIENTS) as pool:
            found = list(pool.map(ask, range(len(files))))
        eventually(server.nothing_left)
    assert found == expected


def _offline(package: Path, files: list[bytes], langs: list[str]) -> list[str]:
    translator = open_translator(package, threads=1)
    texts = []
    for content, lang in zip(files, langs, strict=True):
        audio = decode_audio(io.BytesIO(content))
        texts.append(translator.translate([audio], lang)[0].text)
    translator.close()
    return texts


def test_what_is_reserved_is_taken_at_once(tiny_model: Path, tmp_path: Path) -> None:
    config = PackageConfig(target="onnx", precision="fp32", langs=("de",), force=True)
    translator = open_translator(run_package(config, tiny_model, None, tmp_path / "p").path)
    batch = translator.open_batch(4)
    first = batch.add(translator.inputs(np.zeros(16000, np.float32), "de"), 20)
    said = list(first.tokens)
    _return_memory()  # what earlier tests have freed would be taken again
    before_bytes = resident_memory_bytes()
    batch.reserve(40_000)
    geometry = translator.manifest.decoder
    row_bytes = 2 * 4 * geometry.layers * geometry.kv_heads * geometry.head_dim * 40_000
    assert resident_memory_bytes() - before_bytes > 2 * row_bytes  # of three: row 0's is left alone
    capacity_bytes = resident_memory_bytes()
    while not first.stopped:
        batch.step()
    clip = np.zeros(16000, np.float32)
    assert first.tokens == translator.translate([clip], "de", limits=[20])[0].tokens
    assert first.tokens[: len(said)] == said
    assert resident_memory_bytes() - capacity_bytes < row_bytes
    translator.close()
