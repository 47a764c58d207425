"""The IWSLT layout: a segments YAML of {wav, offset, duration}, one text line a segment, FILE_ORDER.

A source holds one or more sets. A set is a `NAME.yaml` with its text files beside it, in `../txt` or in
`txt/`, named `NAME.de` or `NAME.de.txt`; audio is found by file name anywhere under the source. Where a
directory holds a FILE_ORDER, its YAMLs are one set, one YAML a talk, joined in that order; a single YAML
must then name the files of FILE_ORDER in that order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from halve.corpus import seconds
from halve.errors import CorpusError
from halve.importers.base import (
    AUDIO_SUFFIXES,
    CorpusConfig,
    Row,
    Rows,
    below,
    by_language,
    known_language,
    read_lines,
    source_dir,
    split_of_set,
    wanted_languages,
)
from halve.languages import language
from halve.partials import RECORD

FILE_ORDER = "FILE_ORDER"
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """One segment of a segments YAML."""

    where: str
    wav: str
    offset_s: float
    duration_s: float
    speaker: str | None = None


_Items = list[Entry | str]


def read_segments_yaml(path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a segments YAML and the faults in it.

    Raises:
        CorpusError: missing, or no YAML list.
    """
    items = _items(path)
    entries = [item for item in items if isinstance(item, Entry)]
    return entries, [item for item in items if isinstance(item, str)]


def _items(path: Path) -> _Items:
    """Each item of a segments YAML, or the fault that keeps it from being a segment.

    Raises:
        CorpusError: missing, or no YAML list.
    """
    if not path.is_file():
        raise CorpusError(f"{path}: no such segments file")
    try:
        node = yaml.compose(path.read_text(encoding="utf8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(node, yaml.SequenceNode):
        raise CorpusError(f"{path}: no list", expected="a list of {wav, offset, duration}")
    items: _Items = []
    told = -1
    for item in node.value:
        mark = item.start_mark
        # JSON is YAML too, and may hold every segment on one line.
        column = f":{mark.column + 1}" if mark.line == told else ""
        where, told = f"{path}:{mark.line + 1}{column}", mark.line
        try:
            items.append(_entry(where, _plain(item)))
        except (KeyError, ValueError) as error:
            what = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            items.append(f"{where}: {what}; a segment is {{wav, offset, duration}}")
    return items


# The C loader reads the tens of thousands of lines of a training set in seconds, not minutes.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _plain(node: Any) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("not a mapping")
    found: dict[str, str] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"a {_kind(key)} where a name should be")
        if key.value not in _FACTS:
            continue
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{key.value} is a {_kind(value)}")
        if key.value in found:
            raise ValueError(f"{key.value} is there twice")
        found[key.value] = "" if value.tag == "tag:yaml.org,2002:null" else value.value
    return found


_FACTS = ("wav", "offset", "duration", "speaker_id")


def _kind(node: Any) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "mapping"


def _entry(where: str, item: dict[str, str]) -> Entry:
    if not item["wav"]:
        raise ValueError("wav is empty")
    return Entry(
        where=where,
        wav=item["wav"],
        offset_s=seconds(item["offset"], "offset"),
        duration_s=seconds(item["duration"], "duration"),
        speaker=item.get("speaker_id") or None,
    )


def in_file_order(entries: list[Entry], order: Path) -> tuple[list[Entry], list[str]]:
    """The entries sorted by the talks' order in FILE_ORDER (order inside a talk is kept)."""
    names = [Path(line.strip()).name for line in read_lines(order) if line.strip()]
    places = {_stem(name): index for index, name in enumerate(names)}
    faults = [
        f"{entry.where}: {entry.wav} is not in {order}"
        for entry in entries
        if _stem(entry.wav) not in places
    ]
    present = {_stem(entry.wav) for entry in entries}
    faults += [
        f"{order}:{number}: no segment of {name}"
        for number, name in enumerate(names, start=1)
        if _stem(name) not in present
    ]
    kept = [entry for entry in entries if _stem(entry.wav) in places]
    return sorted(kept, key=lambda entry: places[_stem(entry.wav)]), faults


def _stem(name: str) -> str:
    # Talks are called 2022.acl-long.268: only a known suffix is one.
    path = Path(name)
    return path.stem if path.suffix.lower() in AUDIO_SUFFIXES else path.name


class AudioIndex:
    """Finds audio by the name a segments YAML gives it; what halve has made in the same folders is no source."""

    def __init__(self, *folders: Path) -> None:
        self._files: dict[str, list[Path]] = {}
        for path in (one for folder in folders if folder.is_dir() for one in _given_below(folder)):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                self._files.setdefault(_stem(path.name), []).append(path)

    def find(self, wav: str, near: Path, name: str = "") -> Path:
        """The file; where none is there, the path at which it was expected.

        Args:
            near: the folder of the YAML.
            name: of its set, which folders may be called after.

        Raises:
            CorpusError: several are meant as much as each other.
        """
        direct = near / wav
        if direct.is_file():
            return direct
        found = self._files.get(_stem(Path(wav).name), [])
        if not found:
            return direct
        # Two sets may both have a talk1.wav, as may two speakers: what is named in full is meant, then the nearest.
        fits = {
            path: (_same_end(path, wav), len(_common(path, near)), name in path.parts)
            for path in found
        }
        best = [path for path in found if fits[path] == max(fits.values())]
        if len({path.resolve() for path in best}) > 1:
            raise CorpusError(
                f"{wav} may be {best[0]} or {best[1]}",
                expected="one file of that name, or one that is nearer to its segments",
                mend="name the file with its folders in the segments, or put each set into a folder of its own",
            )
        return best[0]


def _given_below(folder: Path) -> Iterator[Path]:
    """Everything under a folder but what lies in hidden folders and in artefacts: an earlier run's audio, say."""
    left_out: set[Path] = set()
    for path in below(folder):
        is_made = path.is_dir() and (path.name.startswith(".") or (path / RECORD).is_file())
        if is_made or path.parent in left_out:
            left_out.add(path)
        else:
            yield path


def _same_end(path: Path, wav: str) -> int:
    """How many folders and names, from the last, are those that were asked for."""
    mine, its = ([*each.parts[:-1], _stem(each.name)][::-1] for each in (path, Path(wav)))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, its, strict=False)))


def _common(path: Path, near: Path) -> tuple[str, ...]:
    pairs = zip(path.parts, near.parts, strict=False)
    shared: list[str] = []
    for one, other in pairs:
        if one != other:
            break
        shared.append(one)
    return tuple(shared)


@dataclass(frozen=True)
class _Set:
    name: str
    yamls: list[Path]
    order: Path | None


def _yamls(root: Path) -> list[Path]:
    return [path for path in below(root) if _is_yaml(path)]


def _segment_lists(yamls: list[Path], config: CorpusConfig, found: Rows) -> dict[Path, _Items]:
    """The YAMLs that are segments; a recipe or the like beside them is left aside, with a warning.

    Raises:
        CorpusError: one is no list of segments, and no other is there or text of its name lies beside it.
    """
    read: dict[Path, _Items] = {}
    others: dict[Path, CorpusError] = {}
    for path in yamls:
        try:
            read[path] = _items(path)
        except CorpusError as error:
            others[path] = error
    for path, fault in others.items():
        if not read or text_files(path.parent, path.stem, config, alone=False):
            raise fault
        found.warnings.append(f"{path} is left aside: no list of segments, and no text beside it.")
    return read


def _set_of(source: Path) -> _Set:
    """The set of a segments YAML that is named alone."""
    beside = sorted(path for path in source.parent.iterdir() if _is_yaml(path))
    found = _sets(beside, source.parent)
    return next(one for one in found if source in one.yamls)


def read_beside(source: Path, config: CorpusConfig) -> dict[str, Path]:
    """What is read together with a segments YAML that is named alone, by file name: text, FILE_ORDER, other YAMLs.

    Audio is not among it, here as elsewhere: there may be days of it.
    """
    if not _is_yaml(source):
        return {}
    one = _set_of(source)
    texts = text_files(one.yamls[0].parent, one.name, config, alone=True)
    asked = {language(code).code for code in config.lang} or set(texts)
    read = [path for lang, path in texts.items() if lang in asked | {config.source_lang}]
    more = [path for path in one.yamls if path != source]
    order = [] if one.order is None else [one.order]
    return {path.name: path for path in (*read, *more, *order)}


def _is_yaml(source: Path) -> bool:
    return source.suffix in _SUFFIXES and source.is_file()


def _sets(yamls: Iterable[Path], root: Path) -> Iterator[_Set]:
    yamls = list(yamls)
    for folder in sorted({path.parent for path in yamls}):
        here = [path for path in yamls if path.parent == folder]
        order = next(
            (
                place / FILE_ORDER
                for place in (folder, folder.parent)
                if (place / FILE_ORDER).is_file()
            ),
            None,
        )
        if order is not None and len(here) > 1:
            yield _Set(folder.name if folder != root else root.name, here, order)
        else:
            for path in here:
                yield _Set(path.stem, [path], order)


def import_iwslt(source: str, config: CorpusConfig) -> Rows:
    """Reads every set under `source`, or the one of a segments YAML.

    Raises:
        CorpusError: no segments YAML, or no text.
    """
    found = Rows()
    if _is_yaml(Path(source)):
        root = Path(source).parent
        every = [_set_of(Path(source))]
        read = {path: _items(path) for one in every for path in one.yamls}
        folders = [root, root.parent / "wav", root.parent / "audio"]
    else:
        root = source_dir(source, "iwslt")
        read = _segment_lists(_yamls(root), config, found)
        every = list(_sets(read, root))
        folders = [root]
    if not every:
        raise CorpusError(
            f"{root} has no segments YAML",
            expected="NAME.yaml (a list of {wav, offset, duration}) with NAME.en, NAME.de, …",
            mend="see docs/own-data.md for the layout",
        )
    index = AudioIndex(*folders)
    sets = _with_text(every, config, found)
    targets = wanted_languages({lang for _, texts in sets for lang in texts}, config)
    for one, texts in sets:
        items = [item for path in one.yamls for item in read[path]]
        here = [lang for lang in targets if lang in texts]
        _import_set(one, items, texts, here, index, config, found)
    found.rows[:] = _apart(found.rows)
    return found


def _apart(rows: Sequence[Row]) -> list[Row]:
    """Talks of one name in several sets are groups of their own where they are files of their own."""
    files: dict[str | None, set[str]] = {}
    for row in rows:
        files.setdefault(row.group, set()).add(str(row.audio))
    return [
        row
        if len(files[row.group]) == 1
        else replace(row, group=f"{row.id.rpartition('-')[0]}/{row.group}")
        for row in rows
    ]


def _with_text(
    sets: list[_Set], config: CorpusConfig, found: Rows
) -> list[tuple[_Set, dict[str, Path]]]:
    """The sets with their text files; one without any beside others that have is left aside, with a warning."""
    texts = [
        text_files(one.yamls[0].parent, one.name, config, alone=len(sets) == 1) for one in sets
    ]
    pairs = list(zip(sets, texts, strict=True))
    asked = {language(code).code for code in config.lang}
    known = {lang for files in texts for lang in files} - {config.source_lang}
    # Of a set that others have translations for and it has not, nothing can be learnt.
    wanted = asked & known or known
    if not wanted:
        return pairs
    for one, files in pairs:
        if not wanted & set(files):
            lacking = f"into {', '.join(sorted(wanted))} " if files else ""
            found.warnings.append(f"{one.yamls[0]} is left aside: no text {lacking}beside it.")
    return [(one, files) for one, files in pairs if wanted & set(files)]


def _import_set(
    one: _Set,
    items: _Items,
    texts: dict[str, Path],
    targets: list[str],
    index: AudioIndex,
    config: CorpusConfig,
    found: Rows,
) -> None:
    faults = [item for item in items if isinstance(item, str)]
    entries = items
    if one.order is not None:
        # A segment that cannot be read has no place in the order: the lines after it would be another's.
        found.set_faults += faults
        ordered, more = in_file_order(
            [item for item in items if isinstance(item, Entry)], one.order
        )
        found.set_faults += more
        if faults or more:
            return
        # The texts' lines are the YAML's: another order of the talks would shift them unseen.
        if len(one.yamls) == 1 and ordered != items:
            found.set_faults.append(
                f"{one.yamls[0]} names its talks in another order than {one.order}, and its texts' lines cannot be told"
            )
            return
        entries = list(ordered)
    else:
        found.faults += faults
    lines: dict[str, list[str]] = {}
    for lang in [config.source_lang, *targets]:
        if lang not in texts:
            continue
        lines[lang] = read_lines(texts[lang])
        if len(lines[lang]) != len(entries):
            found.set_faults.append(
                f"{texts[lang]}: {len(lines[lang])} lines for the {len(entries)} segments of "
                f"{', '.join(path.name for path in one.yamls)}"
            )
            return
    for number, entry in enumerate(entries):
        if isinstance(entry, Entry):
            audio = index.find(entry.wav, one.yamls[0].parent, one.name)
            found.rows.append(_row(one, number, entry, lines, targets, audio, config))


def _row(
    one: _Set,
    number: int,
    entry: Entry,
    lines: dict[str, list[str]],
    targets: list[str],
    audio: Path,
    config: CorpusConfig,
) -> Row:
    extra = {} if entry.speaker is None else {"speaker": entry.speaker}
    return Row(
        where=entry.where,
        id=f"{one.name}-{number + 1:05d}",
        audio=audio,
        source_text=lines.get(config.source_lang, [""] * (number + 1))[number].strip(),
        references={lang: lines[lang][number].strip() for lang in targets},
        offset_s=entry.offset_s,
        duration_s=entry.duration_s,
        split=split_of_set(one.name),
        group=str(Path(entry.wav).parent / _stem(entry.wav)),
        extra=extra,
    )


def text_files(near: Path, name: str, config: CorpusConfig, alone: bool) -> dict[str, Path]:
    """The text files of a set by language: NAME.de or NAME.de.txt, else, of a lone set, the only *.de.

    Raises:
        CorpusError: several that could be meant.
    """
    named: dict[str, Path] = {}
    others: list[tuple[str, Path]] = []
    taken = {path.stem for path in near.iterdir() if _is_yaml(path)} - {name}
    # Some of them may be one and the same.
    for folder in dict.fromkeys((near, near / "txt", near.parent / "txt", near / "text")):
        if not folder.is_dir():
            continue
        exact = []
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            parts = path.name.removesuffix(".txt").rsplit(".", 1)
            stem, lang = (parts[0], parts[1]) if len(parts) == 2 else ("", parts[0])
            if stem == name:
                exact.append((lang, path))
            elif alone and stem not in taken and known_language(lang):
                others.append((lang, path))
        named = by_language(exact, folder, config) | named
    if set(named) - {config.source_lang}:
        return named
    lacking = [(lang, path) for lang, path in others if known_language(lang) not in named]
    return _lone_texts(lacking, near, config) | named


def _lone_texts(
    others: list[tuple[str, Path]], near: Path, config: CorpusConfig
) -> dict[str, Path]:
    """Texts that do not bear the set's name: taken where nothing else could be meant."""
    counted = Counter(known_language(lang) for lang, _ in others)
    twice = sorted(code for code, count in counted.items() if code and count > 1)
    if twice:
        paths = [str(path) for lang, path in others if known_language(lang) == twice[0]]
        raise CorpusError(
            f"{near} has {len(paths)} texts in {twice[0]}: {', '.join(paths[:3])}",
            expected="the text of NAME.yaml in NAME.LANG",
            mend="name it after the YAML",
        )
    return by_language(others, near, config)
