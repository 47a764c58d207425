"""What a user reads when something fails: one line, and an exit code.

0 done; 1 failed (disk, memory, network, parity); 2 wrong usage or bad input; 130 stopped by Ctrl-C.
"""

import errno
import json
from dataclasses import dataclass

import pydantic
import yaml

from halve.errors import HalveError, MissingExtraError

INTERRUPTED = 130

_EXTRAS = {
    "peft": "train",
    "bitsandbytes": "train",
    "accelerate": "train",
    "datasets": "train",
    "onnxruntime": "cpu",
    "onnx": "export",
    "gguf": "gguf",
    "mweralign": "longform",
    "llama_cpp": "gguf",
    "fastapi": "serve",
    "uvicorn": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "matplotlib": "bench",
    "jinja2": "bench",
    "psutil": "bench",
    "httpx": "bench",
}

_FORMATS: tuple[tuple[type[BaseException], str], ...] = (
    (json.JSONDecodeError, "JSON"),
    (yaml.YAMLError, "YAML"),
    (UnicodeDecodeError, "UTF-8"),
)

_RESUME = "run the same command again: finished work is kept"
_FULL_DISK = (
    "The disk is full",
    f"free some space (`halve clean DIR --keep-unfinished` shows what can go) or choose another --out, then {_RESUME}",
)
_OS_ERRORS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL_DISK,
    errno.EDQUOT: ("The disk quota is used up", _FULL_DISK[1]),
    errno.EROFS: ("The file system is read-only", "choose another --out"),
    errno.EACCES: ("Permission denied", "choose another --out, or change the permissions"),
    errno.EPERM: ("Not permitted", "choose another --out, or change the permissions"),
    errno.EMFILE: ("Too many open files", "raise the limit with ulimit -n"),
    errno.ENOMEM: ("Out of memory", "use smaller batches"),
    errno.EADDRINUSE: ("The address is in use", "choose another --port"),
}


@dataclass(frozen=True)
class Failure:
    """What to print, and what to exit with."""

    message: str
    exit_code: int


def explain(error: BaseException, *, resumes: bool = True) -> Failure:
    """The line and the exit code for anything that a command can raise.

    Args:
        resumes: whether the command keeps finished work when it is stopped.
    """
    if isinstance(error, HalveError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        on = f"To go on, {_RESUME}." if resumes else "The same command begins anew."
        return Failure(f"Stopped. {on}", INTERRUPTED)
    for reading in (_from_text, _from_kind):
        found = reading(error)
        if found is not None:
            return found
    text = f"Unexpected {type(error).__name__}: {one_line(error)}"
    return Failure(f"{text} (run again with --debug to see where).", 1)


def _from_kind(error: BaseException) -> Failure | None:
    """Errors that their class tells."""
    if isinstance(error, pydantic.ValidationError):
        return Failure("; ".join(validation_faults(error)), 2)
    if isinstance(error, OSError):
        return _os_failure(error)
    for kind, name in _FORMATS:
        if isinstance(error, kind):
            return Failure(f"A file is not {name} ({one_line(error)}).", 2)
    if type(error).__name__ == "SafetensorError":
        what = f"A safetensors file is damaged ({one_line(error)})"
        return Failure(f"{what}. To mend it: copy or download the model again.", 2)
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return Failure(str(MissingExtraError(name, _EXTRAS[name])), 1) if name in _EXTRAS else None


def _from_text(error: BaseException) -> Failure | None:
    """Libraries wrap system errors in kinds of their own; only the text still tells them."""
    text = str(error).lower()
    if "cuda" in text and "out of memory" in text:
        return Failure(
            "Out of GPU memory. To mend it: in training --rows-at-once (fewer than a batch) and --checkpoint-activations, "
            "which keep what is done; else a smaller --batch-size, --memory-gb in a search, --dtype bfloat16 where there "
            "is one, with which training and a search begin anew; or compute on the processor, with CUDA_VISIBLE_DEVICES= "
            "before the command.",
            1,
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return Failure(
            "Out of memory. To mend it: use a smaller --batch-size or fewer segments.", 1
        )
    if isinstance(error, OSError) and error.errno:
        return None
    if "no space left on device" in text or "os error 28" in text:
        return Failure(f"{_FULL_DISK[0]}. To mend it: {_FULL_DISK[1]}.", 1)
    if "read-only file system" in text or "os error 30" in text:
        return Failure("The file system is read-only. To mend it: choose another --out.", 1)
    return None


def _os_failure(error: OSError) -> Failure:
    if isinstance(error, BrokenPipeError):
        return Failure("", 1)
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return Failure(f"{error.strerror}{place}. To mend it: check the path.", 2)
    found = _OS_ERRORS.get(error.errno or 0)
    if found:
        return Failure(f"{found[0]}{place}. To mend it: {found[1]}.", 1)
    return Failure(f"{error.strerror or one_line(error)}{place}.", 1)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's text on one line, not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def validation_faults(
    error: pydantic.ValidationError, names: dict[str, str] | None = None
) -> list[str]:
    """One phrase a fault: where, what is wrong, what was found."""
    faults = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"]) or "the settings"
        faults.append(f"{(names or {}).get(place, place)}: {fault_text(fault)}")
    return faults


def fault_text(fault: object) -> str:
    """What is wrong with one value, in a phrase."""
    record = fault if isinstance(fault, dict) else {}
    message = str(record.get("msg", "")).removeprefix("Value error, ")
    kind = record.get("type")
    if kind == "extra_forbidden":
        return "no such setting"
    if kind == "missing":
        return "is missing"
    found = record.get("input")
    shown = repr(found) if len(repr(found)) < 60 and not isinstance(found, dict) else ""
    return f"{message[:1].lower()}{message[1:]}" + (f" (found {shown})" if shown else "")
