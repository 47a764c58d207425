"""`halve clean`: what can go, and its size."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halve import artefact, partials
from halve.errors import ArtefactError, InputError
from pipeline.console import Result, size, table

# What a finished run no longer needs: its student, packages and results stand without them. An adapter is small,
# cost the most, and is in the report; one that is a whole model is another matter.
_REPLACED = "an older version that was being replaced"
_UNFINISHED = "unfinished: a run that was stopped would go on from here"


@dataclass(frozen=True)
class Removable:
    """A directory that can go."""

    path: Path
    why: str
    size_bytes: int


def find(root: Path, keep_unfinished: bool = False) -> list[Removable]:
    """Leftovers of killed runs, and what a finished run made on its way; nothing of a run that is under way.

    Args:
        keep_unfinished: leave what a run that was stopped, or has no report yet, would go on from.

    Raises:
        InputError: no such directory.
    """
    if not root.is_dir():
        raise InputError(f"{root} is no directory", mend="name a run, or the directory runs/")
    found = [(path, why) for path, why in _candidates(root) if not _is_in_use(path)]
    if keep_unfinished:
        found = [(path, why) for path, why in found if why == _REPLACED or _is_over(path.parent)]
    return [Removable(path, why, stored_bytes(path)) for path, why in found]


def _is_over(run: Path) -> bool:
    """Whether a run has come to its end, and no stage of it was begun anew."""
    return _is_whole(run / "report") and not any(run.glob(".*.partial"))


def _is_in_use(path: Path) -> bool:
    """Whether a run writes it, or writes beside it: the run may read it then."""
    beside = [*path.parent.glob(".*.partial"), *path.parent.glob("*/.*.partial")]
    return any(partials.is_being_written(entry) for entry in beside)


def _candidates(root: Path) -> Iterator[tuple[Path, str]]:
    taken: set[Path] = set()
    for path in sorted(entry for entry in root.rglob("*") if entry.is_dir()):
        why = "" if path.is_symlink() or taken & set(path.parents) else _why(path)
        if why:
            taken.add(path)
            yield path, why


def _why(path: Path) -> str:
    """Why a directory can go; nothing for one that must stay."""
    # Other programs use such names too: halve's own hold its records.
    if path.name.startswith(".") and path.name.endswith(".partial") and partials.is_partial(path):
        return _UNFINISHED
    is_old = path.name.startswith(".") and path.name.endswith(".old")
    if is_old and (_is_whole(path) or not any(path.iterdir())):
        return _REPLACED
    return _of_a_run(path)


def _of_a_run(path: Path) -> str:
    """Why a run whose student is finished can do without a directory; nothing for one that it cannot."""
    student, adapter = path.parent / "student", path.parent / "adapter"
    if path.name == "states" and _is_whole(student) and _holds_states(path):
        return "encoded audio: training with other settings would not encode it again"
    if not (_is_whole(path) and _is_whole(student)):
        return ""
    # The student may be an earlier run's: of what was made since, this may be all that there is.
    is_used = {
        "pruned": _was_made_of(student, path),
        "translations": _was_made_of(adapter, path) and _was_made_of(student, adapter),
    }
    if is_used.get(path.name):
        return "made on the way to the student, which is finished; `halve run --from package` goes on without it"
    is_model = path == adapter and (path / "config.json").is_file()
    if is_model and _was_made_of(student, path) and _is_whole(path.parent / "report"):
        return "tuned in full: the student is its copy, and the report has its history (one made anew has not)"
    return ""


def _holds_states(path: Path) -> bool:
    """Whether there is nothing but stores of encoded audio in a directory."""
    entries = list(path.iterdir())
    return bool(entries) and all((entry / "meta.json").is_file() for entry in entries)


def _was_made_of(made: Path, parent: Path) -> bool:
    """Whether an artefact's record names another one, as it now is, among what it was made of."""
    if not (_is_whole(made) and _is_whole(parent)):
        return False
    try:
        return artefact.identity(parent) in artefact.read(made).parents.values()
    except ArtefactError:  # a damaged record
        return False


def _is_whole(path: Path) -> bool:
    return (path / artefact.RECORD).is_file()


def stored_bytes(path: Path) -> int:
    """Bytes that go with a directory: files that have another name elsewhere stay."""
    stats = [entry.stat() for entry in path.rglob("*") if entry.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def clean(root: Path, remove: bool, keep_unfinished: bool = False) -> Result:
    """Lists what can go, or removes it."""
    found = find(root, keep_unfinished)
    freed = sum(one.size_bytes for one in found)
    if remove:
        for one in found:
            shutil.rmtree(one.path)
    data = {
        "removed": remove,
        "bytes": freed,
        "directories": [
            {"path": str(one.path), "why": one.why, "bytes": one.size_bytes} for one in found
        ],
    }
    if not found:
        return Result(f"{root}: nothing can go.", data)
    rows = [[str(one.path), size(one.size_bytes), one.why] for one in found]
    end = f"{size(freed)} removed." if remove else f"{size(freed)} can go; --yes removes it."
    return Result(f"{table(['directory', 'size', 'why'], rows, right=(1,))}\n{end}", data)
