"""ONNX packages on a GPU, as far as that can be shown without one: what binding does there, and libraries that fail."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from export.caches import DeviceCaches
from export.config import PackageConfig
from export.decoding import CUDA, OnnxDecoder
from export.package import run_package
from export.runtime import OnnxTranslator, open_translator
from halve.errors import GpuError


class CopyingBinding:
    """A binding whose inputs are copied when they are bound, as onnxruntime copies them to a GPU."""

    def __init__(self, binding: Any) -> None:
        self._binding, self._iobinding = binding, binding._iobinding
        self._session = binding._session
        self._copies: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        copied = onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy().copy())
        self._copies.append(copied)
        self._binding.bind_ortvalue_input(name, copied)


class CopyingSession:
    """A session with such bindings."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> CopyingBinding:
        return CopyingBinding(self._session.io_binding())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_step_has_its_own_inputs_on_a_gpu(
    packages: dict[str, Path], clips: list, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = open_translator(packages["fp32"]).translate(clips, "de", batch_size=batch_size)
    assert max(len(row.tokens) for row in wanted) > 2, "a second step is taken"
    translator = open_translator(packages["fp32"])
    assert isinstance(translator, OnnxTranslator)
    decoder = translator._decoder
    decoder.session = CopyingSession(decoder.session)
    decoder.on_device = True
    monkeypatch.setattr(
        OnnxDecoder,
        "new_caches",
        lambda self, slots, capacity: DeviceCaches(
            self.geometry, slots, capacity, self._cache_type, "cpu"
        ),
    )
    assert translator.translate(clips, "de", batch_size=batch_size) == wanted


def test_a_gpu_that_cannot_be_used_is_named_or_passed_by(
    student: Path, tiny_corpus: Path, tmp_path: Path, clips: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider is there, its libraries are not: onnxruntime then computes on the processor without a word."""
    config = PackageConfig(target="onnx", precision="fp16", max_drop=100.0)
    half = run_package(config, student, tiny_corpus, tmp_path / "half").path
    wanted = open_translator(half, device="cpu").translate(clips[:1], "de")
    there = [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    with pytest.raises(GpuError, match="has no use of a GPU here"):
        open_translator(half, device="cuda")
    translator = open_translator(half)
    assert isinstance(translator, OnnxTranslator)
    assert translator.device == "cpu"
    assert translator.translate(clips[:1], "de") == wanted
