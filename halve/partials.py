"""Where an artefact is written before it has its place, and what keeps two processes from writing the same one."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from halve.errors import ArtefactError

RECORD = "artefact.json"
CLAIM = "partial.json"
WORK = "work"


def real_place(out: Path) -> Path:
    """A link's target: what is renamed into the link's place would not be where it points."""
    return Path(out).resolve() if Path(out).is_symlink() else Path(out)


def partial_path(out: Path) -> Path:
    """Where an artefact is written before it has its place."""
    out = real_place(out)
    return out.parent / f".{out.name}.partial"


def check_ground(out: Path) -> None:
    """Refuses before any work a directory that another one cannot be renamed into the place of."""
    place, here = out.resolve(), Path.cwd()
    if place in (here, *here.parents):
        what = "the directory that this runs in, or above it"
    elif os.path.ismount(place):
        what = "a mount point"
    else:
        return
    raise ArtefactError(
        f"{out} is {what}, which nothing can take the place of",
        mend=f"name a directory inside it, such as --out {out / 'halve'}",
    )


@contextmanager
def alone(partial: Path) -> Iterator[bool]:
    """Keeps other processes from writing the same artefact at the same time; says whether none does.

    The lock goes with the process, not with its children: a killed run never stands in its successor's way.
    """
    try:
        claim = open(partial / CLAIM, "r+b")  # noqa: SIM115
    except FileNotFoundError:  # published meanwhile
        yield False
        return
    with claim:
        try:
            fcntl.lockf(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


def is_partial(path: Path) -> bool:
    """Whether a directory is what a stage that was stopped left, and not another program's."""
    return any((path / name).exists() for name in (CLAIM, RECORD, WORK))


def is_being_written(partial: Path) -> bool:
    """Whether a process is at work in an unfinished artefact's directory; of one that cannot be asked, too."""
    if not (partial / CLAIM).is_file():
        return False
    try:
        with alone(partial) as is_alone:
            return not is_alone
    except OSError:  # another user's, or on a read-only file system
        return True


def refuse_company(is_alone: bool, partial: Path) -> None:
    """Refuses to go on beside another process.

    Raises:
        ArtefactError: there is one.
    """
    if not is_alone:
        raise ArtefactError(
            f"{partial} is being written by another process",
            mend="wait for that run, stop it, or choose another --out",
        )


def leave(partial: Path) -> None:
    """After a failure: keeps finished work, and only that."""
    work = partial / WORK
    if not (work.is_dir() and any(work.iterdir())):
        shutil.rmtree(partial, ignore_errors=True)


def aside_path(out: Path) -> Path:
    """Where an older artefact waits while its successor takes its place."""
    return out.parent / f".{out.name}.old"


def drop_aside(out: Path) -> None:
    """Deletes what has stepped aside: an older artefact or an empty directory, and nothing else of that name."""
    aside = aside_path(out)
    if aside.is_dir() and ((aside / RECORD).is_file() or not any(aside.iterdir())):
        shutil.rmtree(aside, ignore_errors=True)


def sync(paths: Iterable[Path]) -> None:
    """Waits until files and directories are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
