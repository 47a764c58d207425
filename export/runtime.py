"""Opening anything that translates, and translating with an ONNX package.

An ONNX package needs numpy, onnxruntime and tokenizers; neither torch nor transformers is imported.
"""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.blocks import SMALL_BYTES
from export.manifest import MANIFEST, Manifest, read_manifest
from export.packaged import PackagedTranslator, cannot_be_opened
from export.rows import RowBatch
from halve import environment
from halve.errors import ArtefactError, GpuError, InputError, MissingExtraError
from halve.progress import SILENT, Progress
from halve.shards import half_bytes
from halve.translate import Translator

if TYPE_CHECKING:
    from export.decoding import OnnxDecoder


EIGHT_BIT_CACHES = (1, 32)
"""The onnxruntime that computes with keys and values in 8 bits on a CPU."""
log = logging.getLogger("halve.runtime")


class OnnxTranslator(PackagedTranslator):
    """Translates with an ONNX package."""

    _decoder: "OnnxDecoder"

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        stop_loops: bool = False,
        device: str = "auto",
        rows_at_once: int | None = None,
    ) -> None:
        """Opens a package.

        Args:
            threads: of each graph; None leaves the choice to onnxruntime.
            rows_at_once: parts of a batch that step at once, a thread each, where the decoder is small and
                quantised; as `threads`, or all cores, where None.
            device: cpu or cuda; auto is cuda for a package of precision fp16 where there is one.
            stop_loops: cuts repetition loops before their limit; scores are made without it.

        Raises:
            ArtefactError: files are missing or damaged.
            InputError: a device that this package or this machine has not.
            MissingExtraError: onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "cpu") from None
        manifest = read_manifest(path, "onnx")
        if manifest.cache_bits == 8:
            _check_onnxruntime(path, onnxruntime.__version__)
        self.device = _pick_device(path, manifest, device)
        super().__init__(manifest)
        try:
            self._open(path, threads, stop_loops, rows_at_once)
        except GpuError as error:
            if device != "auto":
                raise
            log.warning("%s computes on the processor: %s", path, error)
            self.device = "cpu"
            self._open(path, threads, stop_loops, rows_at_once)

    def _open(
        self, path: Path, threads: int | None, stop_loops: bool, rows_at_once: int | None
    ) -> None:
        try:
            self._open_parts(path, threads, stop_loops, rows_at_once)
        except GpuError:
            raise
        except Exception as error:  # onnxruntime and tokenizers raise kinds of their own
            raise cannot_be_opened(path, error) from None

    def _open_parts(
        self, path: Path, threads: int | None, stop_loops: bool, rows_at_once: int | None
    ) -> None:
        from export.decoding import OnnxDecoder, RowThreads, open_session, rows_that_agree
        from export.embeddings import EmbeddingTable

        manifest = self.manifest
        self._open_front(path, threads, self.device)
        cores = rows_at_once or threads or environment.cores()
        apart = self._is_cut() and threads != 1 and cores > 1 and _is_small(path)
        # Threads that wait actively after a run are in the way of rows that step in threads of their own.
        session = open_session(path / "decoder.onnx", threads, spin=not apart, device=self.device)
        kept = self._kept(path)
        self._embed = EmbeddingTable(path, manifest.embedding_bits, manifest.decoder.hidden, kept)
        self._decoder = OnnxDecoder(
            session, manifest.decoder, self._embed, manifest.end_ids, stop_loops, kept
        )
        if self._is_cut():
            self._decoder.is_quantised = True
            # A session computes with as many threads in each run: rows at once want one each.
            single = open_session(path / "decoder.onnx", 1, spin=False) if apart else session
            at_once = cores if apart or threads == 1 else 1
            agreeing = None if manifest.rows_alone else rows_that_agree(self._decoder)
            self._decoder.least_rows = agreeing or 1
            if agreeing is None and not (manifest.rows_alone or _is_small(path)):
                log.warning(
                    "%s: on this processor the last bits of a row depend on how many share its step",
                    path,
                )
            # Large decoders must share the reading of their weights, at the price of last bits.
            alone = manifest.rows_alone or (agreeing is None and _is_small(path))
            self._decoder.row_threads = RowThreads(single, at_once, alone)

    def _is_cut(self) -> bool:
        """Whether several rows take their steps in parts: of quantised decoders, whose products are small."""
        return self.manifest.rows_alone or self.manifest.precision in ("int8", "int4")

    def close(self) -> None:
        """See `PackagedTranslator.close`."""
        if self._decoder.row_threads:
            self._decoder.row_threads.close()
        super().close()

    def open_batch(self, slots: int, capacity: int = 512) -> RowBatch:
        """See `PackagedTranslator.open_batch`."""
        from export.decoding import DecodeBatch

        return DecodeBatch(self._decoder, slots, capacity)


def _check_onnxruntime(path: Path, version: str) -> None:
    """Refuses to open a package that keeps keys and values in 8 bits where nothing can compute with them.

    Raises:
        ArtefactError: this onnxruntime cannot.
    """
    if tuple(int(part) for part in version.split(".")[:2]) < EIGHT_BIT_CACHES:
        needed = ".".join(map(str, EIGHT_BIT_CACHES))
        raise ArtefactError(
            f"{path} keeps keys and values in 8 bits, which onnxruntime {version} cannot",
            expected=f"onnxruntime {needed} or newer",
            mend="install that, or make the package again without --kv-bits",
        )


def _is_small(path: Path) -> bool:
    """Whether a decoder's weights may be in memory twice."""
    weights = sum(file.stat().st_size for file in path.glob("decoder.*"))
    return weights <= SMALL_BYTES


def _pick_device(path: Path, manifest: Manifest, device: str) -> str:
    """cpu or cuda.

    Raises:
        InputError: cuda for a package or a machine that cannot.
    """
    import onnxruntime

    fit = manifest.precision == "fp16"
    there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "auto":
        if fit and not there and shutil.which("nvidia-smi"):
            log.warning(
                "%s computes on the processor: this onnxruntime has no CUDA (halve[gpu] instead of halve[cpu])",
                path,
            )
        return "cuda" if fit and there else "cpu"
    if device == "cpu":
        return device
    if device != "cuda" or not fit:
        raise InputError(
            f"{path} ({manifest.precision}) cannot run on {device}",
            expected="the CPU; of ONNX packages, only those of precision fp16 run on a GPU (cuda)",
            mend="package the student with --precision fp16, or use a package of target checkpoint",
        )
    if not there:
        found = ", ".join(onnxruntime.get_available_providers())
        raise InputError(
            f"This onnxruntime cannot compute on a GPU (it has {found})",
            expected="onnxruntime-gpu, whose files exclude onnxruntime's",
            mend="install halve with the extra gpu instead of cpu, or name --device cpu",
        )
    return device


def open_translator(
    path: str | Path,
    *,
    threads: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    rows_at_once: int | None = None,
    stop_loops: bool = False,
    progress: Progress = SILENT,
) -> Translator:
    """Opens a package of any target, a student, a teacher, a model directory or a hub id.

    Args:
        threads: threads to compute with; None leaves the choice to the runtime.
        device: auto, cpu or cuda; an ONNX package of precision fp16 runs on both, others on the CPU.
        dtype: float32, bfloat16 or float16 of a model on torch. Where None, float32 of a model directory if its
            device has room for that, else bfloat16; a checkpoint package's own, but float32 for 16 bits on a CPU
            that has no units for bfloat16, if that fits into memory.
        rows_at_once: see `OnnxTranslator`.
        stop_loops: cuts repetition loops before their limit; scores are made without it.
        progress: is told where a model computes in less than float32 for want of memory.

    Raises:
        ArtefactError: not there, damaged, or of a newer halve.
        InputError: a device or type that this package has not.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        return _open_torch(path, threads, device, dtype, stop_loops, progress)
    manifest = read_manifest(folder)
    if manifest.target == "onnx":
        computes = "float16" if manifest.precision == "fp16" else "float32"
        if dtype not in (None, computes):
            raise InputError(f"{path} cannot compute in {dtype}", expected=computes)
        return OnnxTranslator(
            folder,
            threads=threads,
            device=device,
            rows_at_once=rows_at_once,
            stop_loops=stop_loops,
        )
    if manifest.target == "gguf":
        from export.gguf_runtime import GgufTranslator

        if dtype not in (None, "float32"):
            raise InputError(f"{path} cannot compute in {dtype}", expected="float32")
        return GgufTranslator(folder, threads=threads, device=device, stop_loops=stop_loops)
    translator = _open_torch(
        path, threads, device, dtype or _package_dtype(folder, manifest, device), stop_loops
    )
    translator.languages = tuple(manifest.languages)
    return translator


def _package_dtype(folder: Path, manifest: Manifest, device: str) -> str:
    """What a checkpoint package computes in where nothing is asked for: never in less than it is stored in."""
    try:
        from halve.models import pick_device
    except ImportError:
        raise MissingExtraError("torch", "cpu") from None
    device = pick_device(device)
    if manifest.precision == "fp32":
        return "float32"
    if manifest.precision == "fp16":
        return "float32" if device == "cpu" else "float16"
    return environment.quick_dtype(device, half_bytes(folder))


def _open_torch(
    path: str | Path,
    threads: int | None,
    device: str,
    dtype: str | None,
    stop_loops: bool,
    progress: Progress = SILENT,
) -> Any:
    try:
        from halve.arithmetic import roomy_dtype
        from halve.models import load_model
        from halve.translate import TorchTranslator
    except ImportError:
        raise MissingExtraError("torch", "cpu") from None
    if threads:
        environment.pin_threads(threads)
    computes = dtype or roomy_dtype(path, device, progress)
    return TorchTranslator(load_model(path, dtype=computes, device=device), stop_loops=stop_loops)
