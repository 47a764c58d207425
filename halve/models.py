"""Loading a speech model as stock transformers does, and refusing what does not fit."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve import environment
from halve.errors import ArtefactError, FamilyError, InputError, MissingExtraError
from halve.families import FAMILIES, Family, family_for, released_config, resolve
from halve.json_files import read_json
from halve.model_checks import check_config, check_finite, check_generation, check_loading
from halve.shards import FOREIGN_WEIGHTS, INDEX, SINGLE, WEIGHTS

SPARE_WEIGHTS = ("consolidated*.safetensors", "*.fp32*.safetensors", "*.fp32.json")
"""Second copies of a release's weights, for other software (Mistral's) or in float32 (Whisper's)."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class SpeechModel:
    """A loaded model with its processor and its family."""

    model: Any
    processor: Any
    family: Family
    path: Path
    device: str
    dtype: str

    @property
    def config(self) -> dict[str, Any]:
        """The config.json that the model was loaded from."""
        return read_config(self.path)

    def part(self, dotted: str) -> Any:
        """A part of the model, by one of the family's paths."""
        return resolve(self.model, dotted)


def resolve_model(model: str | Path, weights: bool = True) -> Path:
    """The directory of a model: a local one, or a hub id's snapshot.

    Args:
        weights: False leaves them on the hub: for what a tokenizer or a config tells.

    Raises:
        ArtefactError: not there, and not to be had from the hub.
    """
    path = Path(model)
    if path.is_dir():
        return path
    _need_hub_id(path, model)
    unwanted = [f"*{ending}" for ending in (FOREIGN_WEIGHTS if weights else WEIGHTS)]
    return _download(str(model), ignore_patterns=[*unwanted, *SPARE_WEIGHTS])


def find_config(model: str | Path) -> dict[str, Any]:
    """The config of a model whose weights need not be here.

    Of a directory, or of the hub's cache; else the shapes of a release that a family knows; else the hub's
    config.json, and nothing but that.

    Raises:
        ArtefactError: not there, and not to be had from the hub.
    """
    here = local_model(model)
    if here is not None:
        return read_config(here)
    known = released_config(str(model))
    if known is not None:
        return known
    _need_hub_id(Path(model), model)
    return read_config(_download(str(model), allow_patterns="config.json"))


def local_model(model: str | Path) -> Path | None:
    """A model's directory without asking the hub: a local one, or one that holds its config in the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    if not _is_hub_id(model):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(str(model), "config.json")
    except ValueError:  # a name that the hub could not have, as one with a blank
        return None
    return Path(found).parent if isinstance(found, str) else None


def _need_hub_id(path: Path, model: str | Path) -> None:
    if path.exists() or not _is_hub_id(model):
        raise ArtefactError(f"{model} is no model directory", mend="check the path")


def _download(model: str, **patterns: Any) -> Path:
    """A hub id's snapshot, or the part of it that the patterns name; a refusal says what to do about it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        if (unwanted := patterns.get("ignore_patterns")) is not None:
            patterns["ignore_patterns"] = [*unwanted, *_spare_on_hub(model)]
        return Path(snapshot_download(model, **patterns))
    except GatedRepoError:
        raise ArtefactError(
            f"{model} is gated on the hub", mend="accept its terms there and run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ArtefactError(
            f"{model} is neither a directory here nor a model that the hub shows you",
            mend="check the path or the hub id; for a private model run `hf auth login`",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ArtefactError(
            f"{model} is not a directory here, and the hub does not give it ({type(error).__name__})",
            mend=f"check the network; or run `hf download {model} --local-dir DIR` where there is one, "
            "and name DIR",
        ) from None


def _spare_on_hub(model: str) -> list[str]:
    """Torch's own files where the release has all of it in safetensors, too; nothing where the hub lists no files."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(model)
    except Exception:  # no network, no such model: snapshot_download says what there is to say
        return []
    return ["*.bin", "*.pt"] if SINGLE in names or INDEX in names else []


def _is_hub_id(model: str | Path) -> bool:
    """Whether a name can be one of the hub's: what is known to be a path is none."""
    return isinstance(model, str) and (
        model.count("/") == 1 and not model.startswith((".", "/", "~")) and os.sep * 2 not in model
    )


def read_config(path: Path) -> dict[str, Any]:
    """A model directory's config.json.

    Raises:
        ArtefactError: none there, not JSON, or without what its model type must have.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ArtefactError(
            f"{path} has no config.json" if path.exists() else f"{path} does not exist",
            expected="a Hugging Face model directory",
        )
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ArtefactError(f"{file} is not JSON ({error})") from None
    check_config(file, config)
    return config


def family_of(path: Path) -> Family:
    """The family of a model directory, or of a package of any target."""
    package = path / "package.json"
    if not (path / "config.json").is_file() and package.is_file():
        facts = read_json(package)
        name = facts.get("family") if isinstance(facts, dict) else None
        if name not in FAMILIES:
            raise ArtefactError(
                f"{package} is of family {name!r}" if name else f"{package} names no family",
                expected=f"one of {', '.join(FAMILIES)}",
                mend="make the package again",
            )
        return FAMILIES[name]
    return family_for(read_config(path))


def pick_device(device: str) -> str:
    """`auto` is the GPU where there is one; `split` needs one, or it is the CPU too.

    Raises:
        InputError: no such device, or a GPU where torch finds none.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu" and (not number or number.isdecimal()):
        return "cpu"  # accelerate numbers it: cpu:0
    import torch

    there = torch.cuda.is_available()
    if device not in ("auto", "split", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise InputError(
            f"Unknown device {device!r}", expected="cpu, cuda, cuda:N, auto or (in training) split"
        )
    if kind == "cuda" and not there:
        raise InputError(
            f"This torch {torch.__version__} finds no GPU",
            expected="a CUDA build of torch and a GPU that its driver can use",
            mend="name --device cpu, or install torch for CUDA; `halve doctor` says what there is",
        )
    if device == "auto":
        return "cuda" if there else "cpu"
    return device if there else "cpu"


def load_processor(path: Path) -> Any:
    """The processor of a model directory.

    Raises:
        ArtefactError: its files are missing or damaged.
    """
    family = family_of(path)
    try:
        return family.load_processor(path)
    except Exception as error:  # transformers raises many kinds for damaged files
        raise ArtefactError(
            f"{path}: its processor cannot be loaded ({_first_line(error)})",
            expected="processor, tokenizer and feature extractor files beside config.json"
            if family.reads == "audio"
            else "tokenizer files beside config.json",
        ) from None


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: str | None = None,
    adapter: Path | None = None,
) -> SpeechModel:
    """Loads a model directory with the stock class of its family, in eval mode.

    Args:
        dtype: float32, bfloat16, float16, or auto for the stored one.
        device: cpu, cuda, auto, or split: accelerate spreads the layers over all GPUs.
        quantization: nf4 (double-quantised) or int8 quantise the decoder's linear layers on loading;
            a directory that is stored quantised needs none.
        adapter: a peft adapter to put on.

    Raises:
        ArtefactError: files missing or damaged, or weights that do not fit the config or are no numbers.
        FamilyError: an architecture halve does not know.
    """
    path = resolve_model(path)
    config = read_config(path)
    family = family_for(config)
    device = pick_device(device)
    environment.leave_out_cudnn_attention()
    model = _from_pretrained(path, config, family, dtype, device, quantization)
    if adapter is not None:
        with quiet():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    model.eval()
    check_finite(path, model)
    if device == "split":
        device = str(resolve(model, family.embeddings).weight.device)
    return SpeechModel(model, load_processor(path), family, path, device, dtype)


def _from_pretrained(
    path: Path,
    config: dict[str, Any],
    family: Family,
    dtype: str,
    device: str,
    quantization: str | None,
) -> Any:
    import safetensors
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    check_generation(path)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    stored = config.get("quantization_config") is not None
    if quantization and not stored:
        options["quantization_config"] = quantization_config(family, quantization)
    if quantization or stored or device == "meta":
        options["device_map"] = {"": device}
    if device == "split":
        options["device_map"] = "auto"
    loader = getattr(transformers, family.auto_class)
    try:
        with quiet():
            model, info = loader.from_pretrained(
                str(path),
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, with their names
                **options,
            )
    except (FamilyError, torch.OutOfMemoryError):
        raise
    except StrictDataclassError as error:
        raise ArtefactError(
            f"{path / 'config.json'} contradicts itself ({' '.join(str(error).split())})",
            expected="the config that the weights were saved with",
        ) from None
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ArtefactError(
            f"{path}: its weights cannot be loaded ({_first_line(error)})",
            expected="complete safetensors files that fit config.json",
            mend="copy or make the model again",
        ) from None
    check_loading(path, info)
    if quantization or stored:
        keep_trainable_on_cpu(model)
        if dtype == "float32":
            # What is quantised here is asked to compute so; what is stored says itself what it computes in.
            _widen(model, quantization is not None or not environment.computes_bfloat16(device))
        return model
    return model if device == "split" else model.to(device)


def check_weights(path: Path) -> None:
    """Compares a model's stored tensors with its config as the stock class does, without keeping any.

    Raises:
        ArtefactError: they disagree; the differing keys are named.
    """
    config = read_config(path)
    _from_pretrained(path, config, family_for(config), "auto", "meta", None)


def quantization_config(family: Family, quantization: str) -> Any:
    """bitsandbytes settings that quantise the decoder's linear layers and nothing else.

    NF4 with double quantisation computes in bfloat16 (Dettmers et al. 2023, QLoRA).
    """
    need_bitsandbytes()
    import torch
    from transformers import BitsAndBytesConfig

    # Full in-memory paths: short names are silently ignored.
    parts = (family.audio_tower, family.projector, family.head, *family.unquantised)
    skip = [part for part in parts if part]
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skip,
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    raise InputError(f"Unknown quantisation {quantization!r}", expected="nf4 or int8")


def need_bitsandbytes() -> None:
    """Imports bitsandbytes without its remarks on kernels that this machine does without.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        with quiet():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingExtraError("bitsandbytes", "train") from None


def keep_trainable_on_cpu(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in a first eval pass on avx512_bf16.

    Repacked weights cannot be trained on or saved again.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _widen(model: Any, products: bool) -> None:
    """Makes float32 of what a quantised model has in 16 bits: transformers leaves it as it was stored.

    Args:
        products: have 4-bit layers multiply in float32 too, whatever they were stored to compute in.
    """
    import torch

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if products and hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries show no bars, reports or notices of their own: what is wrong is raised, not logged."""
    from transformers.utils import logging as transformers_logging

    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bitsandbytes = logging.getLogger("bitsandbytes")
    spoken = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Of one library about another's names: nothing that a user of halve could mend.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        bitsandbytes.setLevel(spoken)
        if bars:
            transformers_logging.enable_progress_bar()
