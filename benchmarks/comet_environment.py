"""The environment of its own that COMET runs in, made once by `halve doctor --install-comet`.

unbabel-comet needs transformers below 5, numpy below 2 and protobuf below 5: in halve's own environment pip
would silently take everything back to older versions (docs/decisions/0002).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from halve.errors import HalveError
from halve.progress import SILENT, Progress

REQUIREMENTS = (
    "unbabel-comet==2.2.7",
    "setuptools<81",  # COMET's logging imports pkg_resources, which later ones have not
)
VARIABLE = "HALVE_COMET"
"""Environment variable with the directory to use in place of the default one."""
_MARK = ".halve"
"""A file that says that the directory is halve's to remove."""
NEEDED_BYTES = 4_000_000_000
"""Disk that installing takes, downloads included."""


def default_folder() -> Path:
    """Where the environment lies: $HALVE_COMET, else below the user's cache directory."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "halve" / "comet"


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


def installed(folder: Path | None = None) -> Path | None:
    """The interpreter of a finished environment of today's requirements; None where there is none."""
    python = python_of(folder or default_folder())
    made = python.parent.parent / ".complete"
    is_there = made.is_file() and made.read_text(encoding="utf8").splitlines() == list(REQUIREMENTS)
    return python if is_there and python.exists() else None


def install(folder: Path | None = None, progress: Progress = SILENT) -> Path:
    """Makes the environment, unless it is there, and returns its interpreter.

    A half-made one is thrown away and made again.

    Raises:
        HalveError: no room, or pip failed; what pip said last is part of the message.
    """
    folder = folder or default_folder()
    found = installed(folder)
    if found is not None:
        return found
    _make_room(folder)
    progress.message(f"COMET: making an environment in {folder} (about 1.4 GB, a minute or two)")
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    python = python_of(folder)
    with progress.task("COMET environment", 2) as advance:
        for packages in (("torch==2.13.0",), REQUIREMENTS):
            _run([str(python), "-m", "pip", "install", "-q", *packages], folder)
            advance(note=packages[0])
    # A process of its own, so that what it needs is really there.
    _run([str(python), "-I", "-c", "import comet.models"], folder)
    (folder / ".complete").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf8")
    return python


def _make_room(folder: Path) -> None:
    try:
        if folder.exists():
            ours = any((folder / name).is_file() for name in (_MARK, ".complete"))
            if any(folder.iterdir()) and not ours:
                raise HalveError(
                    f"{folder} holds something that halve has not made",
                    mend=f"remove it, or name another directory in ${VARIABLE}",
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / _MARK).touch()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise HalveError(f"{folder} cannot be written ({error.strerror})") from None
    if free < NEEDED_BYTES:
        raise HalveError(
            f"{free / 1e9:.1f} GB are free in {folder}",
            expected=f"{NEEDED_BYTES / 1e9:.0f} GB for COMET's environment",
            mend=f"name another directory in ${VARIABLE}",
        )


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
    raise HalveError(
        f"COMET's environment in {folder} could not be made: {last}",
        mend="check the network (or pip's index), then run `halve doctor --install-comet` again",
    )
