"""Translating with a GGUF package: the audio encoder in onnxruntime, the decoder in llama.cpp.

Needs llama-cpp-python, gguf, onnxruntime and tokenizers; neither torch nor transformers is imported.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from export.gguf_file import GGUF, GgufTable
from export.manifest import read_manifest
from export.packaged import PackagedTranslator, cannot_be_opened
from export.rows import RowBatch
from halve.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from export.gguf_decoding import LlamaDecoder


class GgufTranslator(PackagedTranslator):
    """Translates with a GGUF package."""

    _decoder: "LlamaDecoder"

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        stop_loops: bool = False,
        device: str = "auto",
    ) -> None:
        """Opens a package.

        Args:
            threads: of the encoder and of the decoder; None takes all cores.
            stop_loops: cuts repetition loops before their limit; scores are made without it.
            device: auto or cpu.

        Raises:
            ArtefactError: files are missing or damaged.
            InputError: a device other than the CPU.
            MissingExtraError: llama-cpp-python, gguf or onnxruntime is not installed.
        """
        check_installed()
        if device not in ("auto", "cpu"):
            raise InputError(
                f"{path} cannot run on {device}",
                expected="the CPU, which GGUF packages run on",
                mend="name --device cpu, or use a package of target checkpoint",
            )
        super().__init__(read_manifest(path, "gguf"))
        self.device = "cpu"
        try:
            self._open(path, threads, stop_loops)
        except Exception as error:  # llama.cpp, onnxruntime and tokenizers raise kinds of their own
            raise cannot_be_opened(path, error) from None

    def _open(self, path: Path, threads: int | None, stop_loops: bool) -> None:
        from export.gguf_decoding import LlamaDecoder

        self._open_front(path, threads)
        vocabulary = self._kept(path)
        self._embed = GgufTable(path / GGUF, vocabulary)
        self._decoder = LlamaDecoder(
            path / GGUF,
            self.manifest.decoder,
            self._embed,
            self.manifest.end_ids,
            exact=self.manifest.precision == "fp32",
            threads=threads,
            stop_loops=stop_loops,
            vocabulary=vocabulary,
        )

    def open_batch(self, slots: int, capacity: int = 512) -> RowBatch:
        """See `PackagedTranslator.open_batch`."""
        from export.gguf_decoding import LlamaBatch

        return LlamaBatch(self._decoder, slots, capacity)


def check_installed() -> None:
    """Raises MissingExtraError where a GGUF package cannot run."""
    for module, name, extra in (
        ("onnxruntime", "onnxruntime", "cpu"),
        ("gguf", "gguf", "gguf"),
        ("llama_cpp", "llama-cpp-python", "gguf"),
    ):
        try:
            __import__(module)
        except ImportError:
            raise MissingExtraError(name, extra) from None
