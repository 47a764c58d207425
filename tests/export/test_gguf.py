"""GGUF packages: the file that is written, and what llama.cpp makes of it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from export.config import PackageConfig
from export.gguf_file import GGUF, GgufTable
from export.package import run_package
from export.rows import Row
from export.runtime import open_translator
from export.vocabulary import Vocabulary
from halve import artefact
from halve.errors import ArtefactError, FamilyError, HalveError, InputError, MissingExtraError
from halve.models import load_model
from halve.translate import TorchTranslator
from tests import tiny

LIMITS = [40, 25, 30, 7, 40]
PRECISIONS = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def unchecked(workshop: Path, student: Path) -> dict[str, Path]:
    """A package in each precision, made without llama.cpp."""
    made = {}
    for precision in PRECISIONS:
        config = PackageConfig(target="gguf", precision=precision, langs=("de", "zh"))
        made[precision] = run_package(config, student, None, workshop / f"gguf-{precision}").path
    return made


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors as floats, in the shapes that torch gives them."""
    return {
        each.name: np.asarray(dequantize(each.data, each.tensor_type)).reshape(each.shape[::-1])
        for each in GGUFReader(path / GGUF).tensors
    }


def test_the_file_holds_the_student_s_weights(unchecked: dict[str, Path], student: Path) -> None:
    stored = load_file(student / "model.safetensors")
    expected = {
        "token_embd.weight": "language_model.model.embed_tokens.weight",
        "output.weight": "language_model.lm_head.weight",
        "blk.1.attn_k.bias": "language_model.model.layers.1.self_attn.k_proj.bias",
        "blk.0.ffn_down.weight": "language_model.model.layers.0.mlp.down_proj.weight",
    }
    # Half a step of 8 bits. Of 4 a whole one: codes go from -8 to 7, and the largest weight is an 8.
    for precision, off in (("fp32", 0), ("fp16", 1e-6), ("int8", 1 / 250), ("int4", 1 / 7.9)):
        found = tensors_of(unchecked[precision])
        decoder = [key for key in stored if key.startswith("language_model.")]
        assert len(found) == len(decoder)
        for name, key in expected.items():
            wanted = stored[key].float().numpy()
            assert np.abs(found[name] - wanted).max() <= off * np.abs(wanted).max(), (
                name,
                precision,
            )


def test_packages_shrink_with_their_precision(unchecked: dict[str, Path]) -> None:
    facts = {p: json.loads((unchecked[p] / "package.json").read_text()) for p in PRECISIONS}
    bits = [facts[p]["onnx"]["bits_per_weight"]["head"] for p in PRECISIONS]
    assert bits == [32, 16, 8.5, 4.5]
    assert facts["int4"]["onnx"]["quantise"] == "rtn"
    assert facts["int8"]["target"] == "gguf" and facts["int8"]["parity"]["passed"] is None
    for path in unchecked.values():
        assert artefact.verify(path) == []
        assert "llama.cpp" in (path / "README.md").read_text()


def test_packaging_again_gives_the_same_bytes(
    unchecked: dict[str, Path], student: Path, tmp_path: Path
) -> None:
    config = PackageConfig(target="gguf", precision="int4", langs=("de", "zh"))
    again = run_package(config, student, None, tmp_path / "gguf-int4").path
    assert artefact.identity(again) == artefact.identity(unchecked["int4"])


def test_a_flipped_byte_is_named(unchecked: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(unchecked["int4"], copy)
    data = bytearray((copy / GGUF).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / GGUF).write_bytes(data)
    assert [fault.split(":")[0] for fault in artefact.verify(copy)] == [GGUF]


def test_the_table_is_read_from_the_file(unchecked: dict[str, Path], student: Path) -> None:
    stored = load_file(student / "model.safetensors")
    table = stored["language_model.model.embed_tokens.weight"].float().numpy()
    tokens = [3, 300, 3]
    assert np.array_equal(GgufTable(unchecked["fp32"] / GGUF)(tokens), table[tokens])
    trimmed = GgufTable(unchecked["fp32"] / GGUF, Vocabulary(np.array([1, 3, 7])))
    assert np.array_equal(trimmed([7, 1]), table[[2, 0]])
    with pytest.raises(InputError, match="token 2 is not in it"):
        trimmed([1, 2])


@pytest.mark.parametrize("missing", ["llama_cpp", "gguf"])
def test_what_is_missing_is_named(
    unchecked: dict[str, Path],
    student: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises
    if missing == "llama_cpp":
        monkeypatch.setitem(sys.modules, "gguf", sys.modules["gguf"])
    with pytest.raises(MissingExtraError, match=r"is not installed.*halve\[gguf\]"):
        open_translator(unchecked["int8"])
    config = PackageConfig(target="gguf", precision="int8")
    with pytest.raises(MissingExtraError, match=r"halve\[gguf\]"):
        run_package(config, student, tiny_corpus, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"precision": "nf4"}, InputError),
        ({"precision": "int4", "quantise": "gptq"}, InputError),
        ({"precision": "int4", "block_size": 64}, InputError),
    ],
)
def test_refuses_what_it_cannot_make(
    student: Path, tmp_path: Path, settings: dict, error: type[Exception]
) -> None:
    with pytest.raises(error):
        run_package(
            PackageConfig(target="gguf", langs=("de",), **settings), student, None, tmp_path / "p"
        )


def test_refuses_rows_that_blocks_cannot_hold(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "m", intermediate_size=80)
    config = PackageConfig(target="gguf", precision="int8", langs=("de",))
    with pytest.raises(FamilyError, match=r"ffn_down.weight has rows of 80 .* multiple of 32"):
        run_package(config, model, None, tmp_path / "p")


class _Memory:
    """In place of llama.cpp: contexts that hold a byte a row, as long as `most` positions allow."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.live: dict[int, dict[int, int]] = {}

    def new_context(self, streams: int, capacity: int) -> int:
        if capacity > self.most:
            raise InputError(f"no room for {capacity} positions")
        self.live[capacity] = {}
        return capacity

    def get_data(self, context: int, state: Any, size: int, slot: int) -> None:
        state[0] = self.live[context][slot]

    def set_data(self, context: int, state: Any, size: int, slot: int) -> bool:
        self.live[context][slot] = state[0]
        return True


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> _Memory:
    """A stand-in for llama.cpp, for as long as a test."""
    memory = _Memory(most=512)
    fake = SimpleNamespace(
        llama_log_callback=lambda note: note,
        llama_batch=object,
        llama_get_memory=lambda context: context,
        llama_free=memory.live.pop,
        llama_state_seq_get_size=lambda context, slot: 1,
        llama_state_seq_get_data=memory.get_data,
        llama_state_seq_set_data=memory.set_data,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setitem(sys.modules, "export.gguf_decoding", fake)  # undone after the test
    del sys.modules["export.gguf_decoding"]
    return memory


def test_rows_outlive_a_cache_that_cannot_grow(memory: _Memory) -> None:
    from export.gguf_decoding import LlamaBatch

    batch = LlamaBatch(memory, 2, 200)
    batch.rows = [Row(9, [1]), Row(9, [2])]
    memory.live[256] = {0: 7, 1: 8}
    for _ in range(2):
        with pytest.raises(InputError, match="no room for 768 positions"):
            batch.reserve(600)
        assert memory.live == {256: {0: 7, 1: 8}}
    batch.reserve(300)
    assert memory.live == {512: {0: 7, 1: 8}}


def test_a_cache_that_is_lost_is_never_used(memory: _Memory) -> None:
    from export.gguf_decoding import LlamaBatch

    memory.embed = lambda tokens: np.zeros((len(tokens), 4), np.float32)
    batch = LlamaBatch(memory, 2, 200)
    batch.rows = [Row(9, [1]), Row(9, [2])]
    memory.live[256] = {0: 7, 1: 8}
    memory.most = 0
    with pytest.raises(InputError, match="no room for 256 positions"):
        batch.reserve(300)
    for use in (batch.step, lambda: batch.reserve(300)):
        with pytest.raises(HalveError, match="rows under way was lost"):
            use()
    batch.remove(batch.rows[0])
    batch.remove(batch.rows[0])
    memory.most = 512
    batch.reserve(300)
    assert memory.live == {512: {}}


needs_llama = pytest.mark.slow  # llama-cpp-python is compiled where it is installed


@pytest.fixture(scope="module")
def checked(workshop: Path, student: Path, tiny_corpus: Path) -> dict[str, Path]:
    made = {}
    for precision in PRECISIONS:
        config = PackageConfig(target="gguf", precision=precision, max_drop=100.0)
        out = workshop / f"gguf-checked-{precision}"
        made[precision] = run_package(config, student, tiny_corpus, out).path
    return made


@pytest.fixture(scope="module")
def expected(student: Path, clips: list) -> list:
    return TorchTranslator(load_model(student)).translate(clips, "de", limits=LIMITS)


@needs_llama
def test_fp32_tokens_are_torch_s_batched_and_alone(
    checked: dict[str, Path], clips: list, expected: list
) -> None:
    parity = json.loads((checked["fp32"] / "package.json").read_text())["parity"]
    assert parity["passed"]
    for found in parity["languages"].values():
        assert found["equal"] + len(found["near_ties"]) == found["segments"] == 6
    translator = open_translator(checked["fp32"], threads=1)
    for batch_size in (1, 2, 16):
        assert translator.translate(clips, "de", limits=LIMITS, batch_size=batch_size) == expected


@needs_llama
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_neighbours(
    checked: dict[str, Path], clips: list, precision: str
) -> None:
    translator = open_translator(checked[precision], threads=1)
    alone = translator.translate(clips, "zh", limits=LIMITS, batch_size=1)
    assert translator.translate(clips, "zh", limits=LIMITS, batch_size=5) == alone
    order = [3, 0, 4, 2, 1]
    mixed = translator.translate(
        [clips[i] for i in order], "zh", limits=[LIMITS[i] for i in order], batch_size=2
    )
    assert mixed == [alone[i] for i in order]


@needs_llama
def test_streams_beams_and_growing_batches(
    checked: dict[str, Path], student: Path, clips: list, expected: list
) -> None:
    translator = open_translator(checked["fp32"], threads=1)
    assert "".join(translator.stream(clips[1], "de", limit=LIMITS[1])) == expected[1].text
    beams = TorchTranslator(load_model(student)).translate(clips, "de", limits=LIMITS, beams=4)
    assert translator.translate(clips, "de", limits=LIMITS, beams=4) == beams
    batch = translator.open_batch(2, capacity=64)
    first = batch.add(translator.inputs(clips[0], "de"), LIMITS[0])
    batch.step()
    second = batch.add(translator.inputs(clips[2], "de"), 300)  # the caches must grow
    while not first.stopped or len(second.tokens) < 10:
        batch.step()
    assert first.tokens == expected[0].tokens
    assert second.tokens[:10] == expected[2].tokens[:10]
    translator.close()


@needs_llama
def test_a_trimmed_vocabulary_says_the_same(
    student: Path, tiny_corpus: Path, tmp_path: Path, clips: list
) -> None:
    config = PackageConfig(
        target="gguf", precision="fp32", langs=("de",), trim_vocab=True, force=True
    )
    path = run_package(config, student, tiny_corpus, tmp_path / "p").path
    kept = set(np.load(path / "vocabulary.npy").tolist())
    whole = TorchTranslator(load_model(student)).translate(clips, "de", limits=[4] * len(clips))
    for clip, row in zip(clips, whole, strict=True):
        found = open_translator(path).translate([clip], "de", limits=[4])[0]
        shared = next((i for i, t in enumerate(row.tokens) if t not in kept), len(row.tokens))
        assert found.tokens[:shared] == row.tokens[:shared]


@needs_llama
@pytest.mark.parametrize("name", [GGUF, "encoder.bin", "tokenizer.json"])
def test_damaged_packages_are_named(unchecked: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(unchecked["int8"], copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:1000])
    with pytest.raises(ArtefactError, match="cannot be opened"):
        open_translator(copy)


@needs_llama
def test_refuses_devices_and_overlong_rows(unchecked: dict[str, Path], clips: list) -> None:
    with pytest.raises(InputError, match="cannot run on cuda"):
        open_translator(unchecked["int8"], device="cuda")
    with pytest.raises(InputError, match="positions"):
        open_translator(unchecked["int8"]).translate(clips[:1], "de", limits=[5000])
