"""What every importer hands over: segments as their source tells them, and the faults it met."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from halve.config import Config, Seed
from halve.errors import CorpusError
from halve.families import DEFAULT_FAMILY
from halve.languages import LANGUAGES, language

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Named = TypeVar("Named")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")


class CorpusConfig(Config):
    """How a corpus is imported."""

    ADDED_LATER = frozenset({"untranslated"})

    format: Literal["iwslt", "acl6060", "hf", "tsv", "text", "halve"]
    """Layout of the source: see docs/own-data.md."""
    split: Literal["given", "group", "segment", "paper"] | None = None
    """given: as the source says; group: by talk, page or speaker; segment: by segment, each its own
    group; paper: the 784/100 of Moslem 2025 (ACL 60/60 only). Without it: given, where any segment has a split
    (all must then), else group."""
    lang: tuple[str, ...] = ()
    """Only these target languages; all that the source has where none is named."""
    source_lang: str = "en"
    """The language that is spoken."""
    family: str = DEFAULT_FAMILY
    """The model family whose longest audio no segment may exceed."""
    select_share: Share = 0.1
    """Share of the segments that go to select, where halve splits."""
    test_share: Share = 0.1
    """Share of the segments that go to test, where halve splits."""
    faulty: Literal["refuse", "drop"] = "refuse"
    """refuse: any fault stops the import; drop: faulty segments are left out and listed in dropped.json."""
    duplicates: Literal["refuse", "keep"] = "refuse"
    """Two segments with the same text: a fault, or kept ("Thank you." is said in every talk)."""
    untranslated: Literal["refuse", "keep"] = "refuse"
    """A train segment without a translation: a fault, or kept for `halve distill --untranslated`."""
    subset: str | None = None
    """hf: the configuration of the data set, where it has several."""
    audio_column: str = "audio"
    """hf: the column that holds the audio."""
    text_column: str = "text_{lang}"
    """hf: the columns that hold transcript and translations, by language."""
    group_column: str | None = None
    """hf: the column that says which talk or speaker a segment is of; without it each is its own."""
    seed: Seed = 0
    """Decides which groups or segments go to which split."""

    @model_validator(mode="after")
    def _train_is_left(self) -> "CorpusConfig":
        if self.select_share + self.test_share >= 1:
            raise ValueError("select_share and test_share leave nothing to train on")
        return self


@dataclass(frozen=True)
class Sound:
    """Audio that is not a file of its own: bytes from a data set."""

    name: str
    read: Callable[[], bytes]
    """Fetches them: a data set's audio need not fit into memory."""
    size_bytes: int

    @property
    def data(self) -> bytes:
        """The bytes of an audio file, fetched anew each time."""
        return self.read()


@dataclass(frozen=True)
class Row:
    """One segment as its source tells it."""

    where: str
    """file:line, for messages."""
    id: str
    audio: Path | Sound | None
    """None: a text without audio."""
    source_text: str
    references: dict[str, str]
    offset_s: float = 0.0
    duration_s: float | None = None
    """None: the whole file."""
    source_lang: str | None = None
    """What is spoken, where the source tells it; else the language that the settings name."""
    split: str | None = None
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    stays_in_train: bool = False
    """Wherever splits are dealt out: it has no translation to score with."""


@dataclass
class Rows:
    """All segments of a source, and the faults met while reading it."""

    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """One a segment that could not be made a row: `faulty="drop"` leaves it out."""
    set_faults: list[str] = field(default_factory=list)
    """Of a file or set as a whole: no segment could be left out to mend them, so they always stop the import."""
    warnings: list[str] = field(default_factory=list)


Importer = Callable[[str, CorpusConfig], Rows]


def source_dir(source: str, format_name: str) -> Path:
    """The source as a directory.

    Raises:
        CorpusError: it is none.
    """
    path = Path(source)
    if not path.is_dir():
        raise CorpusError(
            f"{path} is a file" if path.exists() else f"{path} does not exist",
            expected=f"a directory in the {format_name} layout",
            mend="name the unpacked directory",
        )
    return path


def below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Everything under a folder in the order of names, a folder before what it holds; links are followed.

    A link to a folder that it lies in would lead round for ever: it is not entered.

    Raises:
        CorpusError: a folder that cannot be read.
    """
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        entries = [] if here in above else sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(
            f"{folder} cannot be read ({error.strerror})",
            mend="allow it, or name a directory that does not hold this one",
        ) from None
    for entry in entries:
        yield Path(entry.path)
        # `DirEntry.is_dir` fails on a link to itself; on anything else it saves a look at the disk.
        linked = entry.is_symlink()
        if Path(entry.path).is_dir() if linked else entry.is_dir():
            yield from below(Path(entry.path), above | {here})


_REGION = re.compile(r"[a-z]{2}|\d{3}|hans|hant|latn|cyrl|arab")


def known_language(code: str) -> str | None:
    """The two-letter code that a file or column name stands for (de, de-AT, zh_Hans); None where it is no language."""
    key, *more = code.strip().lower().replace("_", "-").split("-")
    return key if key in LANGUAGES and all(map(_REGION.fullmatch, more)) else None


def by_language(
    named: Iterable[tuple[str, Named]], where: object, config: CorpusConfig
) -> dict[str, Named]:
    """One thing a language, of those named by a code: the bare code goes before one with a region.

    Raises:
        CorpusError: two of a language that is wanted, neither of them by its bare code.
    """
    wanted = {config.source_lang, *(language(code).code for code in config.lang)}
    several: dict[str, list[tuple[str, Named]]] = defaultdict(list)
    for written, thing in named:
        if code := known_language(written):
            several[code].append((written, thing))
    found = {}
    for code, things in several.items():
        bare = [thing for written, thing in things if written.strip().lower() == code]
        if not bare and len(things) > 1:
            if config.lang and code not in wanted:
                continue
            raise CorpusError(
                f"{where} has {' and '.join(str(thing) for _, thing in things[:3])}, all of them {language(code).name}",
                expected="one text a language",
                mend=f"name the one that is meant {code}, or move the others elsewhere",
            )
        found[code] = (bare or [thing for _, thing in things])[0]
    return found


def wanted_languages(found: Iterable[str], config: CorpusConfig) -> list[str]:
    """The target languages to import, sorted.

    Raises:
        CorpusError: one that was asked for is not there, or there is none.
    """
    targets = sorted(set(found) - {config.source_lang})
    asked = [language(code).code for code in config.lang]
    missing = [code for code in asked if code not in targets]
    if missing or not targets:
        raise CorpusError(
            f"No translations into {', '.join(missing) or 'any language'} were found",
            expected=f"files or columns for the language; found: {', '.join(targets) or 'none'}",
            mend="see docs/own-data.md for the names that halve looks for",
        )
    return asked or targets


def read_lines(path: Path) -> list[str]:
    """A text file's lines, without a last empty one.

    Raises:
        CorpusError: unreadable, or not UTF-8.
    """
    data = path.read_bytes()  # once: it may be a pipe
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CorpusError(
            f"{path}:{line}: not UTF-8", mend="convert the file, for example with iconv"
        ) from None
    return split_lines(text)


def split_lines(text: str) -> list[str]:
    """A text's lines as line feeds end them, without a last empty one.

    Other characters that Unicode lets end a line (U+2028, say) stand inside it, as `wc -l` counts.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "select": "select",
    "dev": "select",
    "valid": "select",
    "validation": "select",
    "test": "test",
    "tst": "test",
    "eval": "test",
    "evaluation": "test",
    "newsdev": "select",
    "newstest": "test",
    "generaltest": "test",
    "wmttest": "test",
    "devtest": "test",
}


def split_name(text: str) -> str | None:
    """train, select or test, from the names that data sets use (dev, validation, tst2022, …)."""
    word = "".join(char for char in text.strip().lower() if char.isalpha())
    return _SPLIT_NAMES.get(word)


def split_of_set(name: str) -> str | None:
    """The split of a set by the first word of its name that is one: tst-COMMON, IWSLT.tst2022, train_clean."""
    words = re.split(r"[\W\d_]+", name)
    return next((split for word in words if (split := split_name(word))), None)
