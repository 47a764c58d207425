"""Artefacts: directories that say what made them, complete as soon as they have an artefact.json.

An artefact is written in a directory beside its place (".NAME.partial") and renamed into it. A killed
run leaves that directory behind; the next run with the same inputs gets it back and goes on. Times and
machine go to `timings.jsonl`, which no hash covers, so that a repeated run has the same hashes.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halve import environment, partials
from halve.errors import ArtefactError
from halve.hashing import file_sha256, sha256_of
from halve.json_files import append_jsonl, read_json, write_json

SCHEMA_VERSION = 1
REVISIONS: Mapping[str, int] = {"translations": 2}
"""By kind: raised whenever a change of the code changes what a stage makes of the same inputs, so that it is made again."""
RECORD = partials.RECORD
TIMINGS = "timings.jsonl"
_UNHASHED = {RECORD, TIMINGS, partials.CLAIM}
log = logging.getLogger(__name__)
_LEFT_BEHIND = {".cache", ".gitattributes", ".DS_Store", ".ipynb_checkpoints"}


@dataclass(frozen=True)
class FileRecord:
    """One file of an artefact."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Artefact:
    """A complete artefact on disk."""

    path: Path
    kind: str
    schema_version: int
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    parents: dict[str, str]
    files: dict[str, FileRecord]
    fingerprint: str
    extra: dict[str, Any]


@dataclass
class Draft:
    """An artefact being written."""

    path: Path
    resumed: bool
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Resume state: kept while the stage runs, gone when it is published."""
        folder = self.path / partials.WORK
        folder.mkdir(exist_ok=True)
        return folder

    def timing(self, event: str, seconds: float, **facts: Any) -> None:
        """Notes how long something took, with date and machine, outside every hash."""
        record = {"event": event, "seconds": round(seconds, 3), **facts}
        append_jsonl(self.path / TIMINGS, record)


def _files(path: Path) -> list[str]:
    names = (entry.relative_to(path) for entry in path.rglob("*") if entry.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() not in _UNHASHED and name.parts[0] != partials.WORK
    )


def _is_left_behind(name: str) -> bool:
    """Whether a program put the file there of itself: a downloader, a file browser, a notebook, NFS."""
    return any(part in _LEFT_BEHIND or part.startswith(".nfs") for part in name.split("/"))


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden; `name` from the artefact's directory on."""
    return "/." in f"/{name}"


def read(path: str | Path, kind: str | tuple[str, ...] | None = None) -> Artefact:
    """Reads an artefact's record.

    Raises:
        ArtefactError: no artefact, another kind than `kind`, or written by a newer halve.
    """
    path = Path(path)
    if not (path / RECORD).is_file():
        found = f"{path} is no artefact" if path.exists() else f"{path} does not exist"
        wanted = f"a directory with {RECORD}" + (f" of kind {kind}" if kind else "")
        raise ArtefactError(found, expected=wanted, mend="name the directory a halve stage wrote")
    record = read_json(path / RECORD)
    try:
        _check_version(path, record["schema_version"])
        made = _from_record(path, record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{path / RECORD} is no record of an artefact ({type(error).__name__}: {error})",
            expected="the file that a halve stage wrote",
            mend="make the artefact again",
        ) from None
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds and made.kind not in kinds:
        raise ArtefactError(f"{path} is of kind {made.kind}", expected=" or ".join(kinds))
    return made


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise ArtefactError(
            f"{path} has schema version {version}",
            expected=f"{SCHEMA_VERSION} or older",
            mend="use a newer halve, or make the artefact again with this one",
        )


def _from_record(path: Path, record: dict[str, Any]) -> Artefact:
    files = {
        name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()
    }
    return Artefact(
        path=path,
        kind=record["kind"],
        schema_version=record["schema_version"],
        recipe=record["recipe"],
        seed=record["seed"],
        versions=record["versions"],
        parents=record["parents"],
        files=files,
        fingerprint=record["fingerprint"],
        extra=record.get("extra", {}),
    )


def verify(path: str | Path) -> list[str]:
    """Compares an artefact's files with its record; an empty list means that all is well."""
    artefact = read(path)
    present = set(_files(artefact.path))
    faults = [f"{name}: missing" for name in artefact.files if name not in present]
    beside = sorted(present - set(artefact.files))
    faults += [f"{name}: not in the record" for name in beside if not _is_left_behind(name)]
    whole = []
    for name in sorted(present & set(artefact.files)):
        size, wanted = (artefact.path / name).stat().st_size, artefact.files[name].size_bytes
        if size == wanted:
            whole.append(name)
        else:
            faults.append(f"{name}: {size} bytes, the record says {wanted}")
    hashes = sha256_of((artefact.path / name for name in whole), fresh=True)
    faults += [
        f"{name}: its sha256 differs from the record (damaged or edited)"
        for name, found in zip(whole, hashes, strict=True)
        if found != artefact.files[name].sha256
    ]
    return faults


def identity(path: str | Path) -> str:
    """The hash that stands for a directory as a parent.

    Of an artefact, the hash of its record, which holds the hash of every file; of any other directory
    (a model from elsewhere), a hash over its files' names and contents, hidden ones left out.
    """
    path = Path(path)
    if (path / RECORD).is_file():
        return file_sha256(path / RECORD)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise ArtefactError(f"{path} does not exist")
    digest = hashlib.sha256()
    # What a downloader keeps in hidden folders (.cache, .git) changes and is not the model.
    names = [name for name in _files(path) if not is_hidden(name)]
    for name, found in zip(names, sha256_of(path / name for name in names), strict=True):
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()


def languages_of(path: Path) -> tuple[str, ...]:
    """The target languages that an artefact was made for, as far as its record says."""
    if not (path / RECORD).is_file():
        return ()
    made = read(path)
    langs = made.recipe.get("langs") or made.extra.get("langs") or ()
    return (langs,) if isinstance(langs, str) else tuple(langs)


def fingerprint(
    kind: str, recipe: Mapping[str, Any], seed: int, parents: Mapping[str, Path]
) -> str:
    """The hash of everything that decides what a stage makes: its kind, recipe slice, seed, inputs and code version."""
    return _fingerprint(
        kind, recipe, seed, {name: identity(path) for name, path in parents.items()}
    )


def _fingerprint(
    kind: str, recipe: Mapping[str, Any], seed: int, parents: Mapping[str, str]
) -> str:
    facts = {
        "kind": kind,
        "recipe": recipe,
        "seed": seed,
        "parents": parents,
        "schema_version": SCHEMA_VERSION,
        "code": environment.halve_version(),
        **({"revision": REVISIONS[kind]} if kind in REVISIONS else {}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_current(
    out: Path, kind: str, recipe: Mapping[str, Any], seed: int, parents: Mapping[str, Path]
) -> bool:
    """Whether `out` already is what this stage would make.

    Raises:
        ArtefactError: it was, and lacks files or has others of their names now; or something is in the way.
    """
    out = partials.real_place(out)
    _finish_publishing(out)
    if not (out / RECORD).is_file():
        return False
    artefact = read(out)
    if artefact.kind != kind or artefact.fingerprint != fingerprint(kind, recipe, seed, parents):
        return False
    _check_sizes(artefact)
    return True


def _check_sizes(artefact: Artefact) -> None:
    """Refuses an artefact whose files are gone or cut: the hashes would take too long to look at each time."""
    for name, record in artefact.files.items():
        file = artefact.path / name
        if not file.is_file() or file.stat().st_size != record.size_bytes:
            raise ArtefactError(
                f"{file} is {'missing' if not file.is_file() else 'not as it was written'}",
                expected=f"the {record.size_bytes:,} bytes that {RECORD} has on record",
                mend=f"put it back, or remove {artefact.path} to have it made again",
            )


@contextmanager
def writing(
    out: Path,
    kind: str,
    recipe: Mapping[str, Any],
    seed: int,
    parents: Mapping[str, Path],
    *,
    work_needs: tuple[Collection[str], Collection[str]] | None = None,
) -> Iterator[Draft]:
    """Writes an artefact: complete in its place at the end, or not there at all.

    Args:
        work_needs: the settings and the inputs that unfinished work depends on, where those are not all: it is kept when
            only others have changed.

    Raises:
        ArtefactError: `out` is taken by something else, is one of the inputs, lies inside an artefact, or is
            being written by another process.
    """
    out = partials.real_place(out)
    partials.check_ground(out)
    _finish_publishing(out)
    _check_place(out, kind, recipe)
    _check_inputs(out, parents.values())
    hashes = {name: identity(path) for name, path in parents.items()}
    claim = _fingerprint(kind, recipe, seed, hashes)
    partial = partials.partial_path(out)
    if (partial / partials.CLAIM).is_file():
        with partials.alone(partial) as is_alone:
            partials.refuse_company(is_alone, partial)
    of_work = ""
    if work_needs is not None:
        used = {key: value for key, value in recipe.items() if key in work_needs[0]}
        heard = {name: value for name, value in hashes.items() if name in work_needs[1]}
        of_work = _fingerprint(kind, used, 0, heard)
    draft = _open_draft(partial, claim, of_work)
    started = time.monotonic()
    with partials.alone(partial) as is_alone:
        partials.refuse_company(is_alone, partial)
        try:
            yield draft
        except BaseException:
            partials.leave(partial)
            raise
        draft.timing("stage", time.monotonic() - started, kind=kind, date=_today(), **_where())
        record = {
            "kind": kind,
            "schema_version": SCHEMA_VERSION,
            "recipe": dict(recipe),
            "seed": seed,
            "versions": environment.versions(),
            "parents": hashes,
            "files": _records(partial),
            "fingerprint": claim,
            "extra": draft.extra,
        }
        write_json(partial / RECORD, record)
        _publish(partial, out)


def _records(path: Path) -> dict[str, dict[str, Any]]:
    names = _files(path)
    hashes = sha256_of(path / name for name in names)
    return {
        name: {"bytes": (path / name).stat().st_size, "sha256": found}
        for name, found in zip(names, hashes, strict=True)
    }


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _where() -> dict[str, Any]:
    return {
        "cpu": environment.cpu_model(),
        "instructions": list(environment.instructions()),
        "cores": environment.cores(),
        **environment.gpu_in_use(),
    }


def _check_place(out: Path, kind: str, recipe: Mapping[str, Any]) -> None:
    """Refuses to replace anything but an older artefact of the same kind, and nothing that was put beside its files.

    One stage may make two kinds: `tune` a student in full, else an adapter. Its settings tell it.
    """
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    old = read(out) if (out / RECORD).is_file() else None
    if old is not None and (old.kind == kind or old.recipe.keys() == recipe.keys()):
        others = [n for n in _files(out) if n not in old.files and not _is_left_behind(n)]
        if others:
            raise ArtefactError(
                f"{out} also holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}, which would be lost",
                expected=f"an artefact of kind {kind} as it was written",
                mend="move that elsewhere, or choose another --out",
            )
        return
    raise ArtefactError(
        f"{out} is in the way",
        expected=f"a new directory, or an older artefact of kind {kind}",
        mend="choose another --out",
    )


def _check_inputs(out: Path, parents: Iterable[Path]) -> None:
    """An output must not replace its own input, nor change what another artefact or a model consists of."""
    place, inputs = out.resolve(), [Path(path).resolve() for path in parents]
    if place in inputs:
        raise ArtefactError(f"{out} would replace its own input", mend="choose another --out")
    for folder in place.parents:
        if folder in inputs or (folder / RECORD).is_file():
            raise ArtefactError(
                f"{out} would lie inside {folder}, which would then no longer be what it was",
                mend="choose another --out",
            )


def _open_draft(partial: Path, claim: str, of_work: str = "") -> Draft:
    """Takes a killed run's partial directory when it was making the same thing, else a fresh one.

    Args:
        of_work: stands for what unfinished work depends on, where that is not all.
    """
    record = partial / partials.CLAIM
    ours = {"fingerprint": claim} | ({"work": of_work} if of_work else {})
    if record.is_file():
        work = partial / partials.WORK
        try:
            found = json.loads(record.read_bytes())
            if found["fingerprint"] == claim or (of_work and found.get("work") == of_work):
                for torn in partial.rglob(".*.new"):  # `write_json` was killed at it
                    torn.unlink()
                if found["fingerprint"] != claim:
                    _clear_but(partial, work)
                    write_json(record, ours)
                return Draft(partial, resumed=True)
        except (ValueError, KeyError):
            pass
        if work.is_dir() and any(work.iterdir()):
            log.warning("%s was begun with other settings, inputs or code: it starts anew", partial)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(record, ours)
    return Draft(partial, resumed=False)


def _clear_but(partial: Path, kept: Path) -> None:
    for entry in partial.iterdir():
        if entry.is_dir() and entry != kept:
            shutil.rmtree(entry)
        elif not entry.is_dir():
            entry.unlink()


def _finish_publishing(out: Path) -> None:
    """A run killed after its record was written had only the renaming left to do; a living one does it itself."""
    if (out / RECORD).is_file():
        claim = out / partials.CLAIM
        if claim.exists():  # a read-only place refuses to unlink even what is not there
            claim.unlink(missing_ok=True)
        partials.drop_aside(out)
    partial = partials.partial_path(out)
    if not (partial / RECORD).is_file():
        return
    with partials.alone(partial) as is_alone:
        if not is_alone:
            return
        try:
            read(partial)
        except ArtefactError:  # the kill tore the record itself
            (partial / RECORD).unlink()
        else:
            _publish(partial, out)


def _publish(partial: Path, out: Path) -> None:
    """Renames the finished directory into its place; an older artefact steps aside first.

    The claim, whose lock keeps others away, goes last.

    Raises:
        ArtefactError: something has come into the way meanwhile; the finished directory stays.
    """
    made = read(partial)
    _check_place(out, made.kind, made.recipe)
    shutil.rmtree(partial / partials.WORK, ignore_errors=True)
    # Closing a file gives up the process's lock on it.
    partials.sync([e for e in partial.rglob("*") if e.is_file() and e != partial / partials.CLAIM])
    partials.sync([partial])
    partials.drop_aside(out)
    if out.exists():
        out.rename(partials.aside_path(out))
    partial.rename(out)
    (out / partials.CLAIM).unlink(missing_ok=True)
    partials.sync([out.parent])
    partials.drop_aside(out)
