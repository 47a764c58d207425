"""An ONNX package behind the server: rows join and leave, and no text changes."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from export.config import PackageConfig
from export.package import run_package
from export.runtime import open_translator
from halve.audio import decode_audio
from serve.settings import ServeSettings
from tests.serve.conftest import eventually, serving, wav

CLIENTS = 8


def test_texts_do_not_depend_on_the_company(tiny_model: Path, tmp_path: Path) -> None:
    package = tmp_path / "onnx"
    config = PackageConfig(target="onnx", precision="fp32", langs=("de", "zh"), force=True)
    run_package(config, tiny_model, None, package)
    files = [wav(0.4 + index * 0.3, index) for index in range(2 * CLIENTS)]
    langs = ["de", "zh"] * CLIENTS
    expected = _offline(package, files, langs)
    with serving(ServeSettings(models=(str(package),), threads=1, batch_size=6)) as server:

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
