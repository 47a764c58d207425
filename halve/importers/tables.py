"""Importers of tables: TSV, and a corpus that halve wrote."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from halve.corpus import read_corpus, seconds
from halve.errors import CorpusError
from halve.importers.base import (
    CorpusConfig,
    Row,
    Rows,
    by_language,
    read_lines,
    split_name,
    wanted_languages,
)

_TEXT_COLUMNS = ("text", "source_text", "transcript", "sentence")
_KNOWN = (
    *_TEXT_COLUMNS,
    "audio",
    "id",
    "offset",
    "offset_s",
    "duration",
    "duration_s",
    "split",
    "group",
    "talk",
    "speaker",
)


def import_tsv(source: str, config: CorpusConfig) -> Rows:
    """A table with a header line: audio, the translations (de, text_de or translation_de) and, where there
    are any, id, offset, duration, text, split, group. Audio paths are relative to the table. A table of
    plain text has no audio column, and the source's text instead.

    Raises:
        CorpusError: no table, or one without the columns that a corpus needs.
    """
    path = _table(Path(source))
    # Texts hold quotation marks: a TSV has no quoting.
    rows = [line.split("\t") for line in read_lines(path)]
    header = _header(path, rows)
    columns = _language_columns(header, config)
    has_source = any(name in header for name in _TEXT_COLUMNS) or config.source_lang in columns
    if not columns or ("audio" not in header and not has_source):
        raise CorpusError(
            f"{path}:1: the header is {', '.join(header) or 'empty'}",
            expected="tab-separated columns: audio (or, for plain text, the source's text), one per target "
            "language (de or text_de), and optionally id, offset, duration, text, split, group",
            mend="add a header line with these names",
        )
    found = Rows()
    if unused := [name for name in header if name and name not in {*columns.values(), *_KNOWN}]:
        found.warnings.append(f"{path}:1: nothing is done with {', '.join(unused)}")
    for number, cells in enumerate(rows[1:], start=2):
        where = f"{path}:{number}"
        if not any(cell.strip() for cell in cells):
            continue
        if any("\r" in cell for cell in cells):
            found.faults.append(f"{where}: a carriage return inside the line")
            continue
        if len(cells) != len(header):
            found.faults.append(f"{where}: {len(cells)} columns, the header has {len(header)}")
            continue
        record = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        try:
            found.rows.append(_table_row(where, path.parent, record, columns, config))
        except ValueError as error:
            found.faults.append(f"{where}: {error}")
    return found


def _header(path: Path, rows: list[list[str]]) -> list[str]:
    """The names of the columns, in lower case.

    Raises:
        CorpusError: a column that is there twice, or lines that no line feed ends.
    """
    cells = rows[0] if rows else []
    if any("\r" in cell for cell in cells):
        raise CorpusError(
            f"{path}:1: lines end in a carriage return alone",
            expected="line feeds, with or without a carriage return before them",
            mend="convert the file, for example with `tr '\\r' '\\n'`",
        )
    header = [cell.strip().lower() for cell in cells]
    twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if twice:
        raise CorpusError(
            f"{path}:1: the header names {', '.join(twice)} more than once",
            expected="each column once, capitals aside",
            mend="rename or remove all but one of them",
        )
    return header


def _table(path: Path) -> Path:
    if path.is_dir():
        tables = sorted(path.glob("*.tsv"))
        if len(tables) == 1:
            return tables[0]
        raise CorpusError(
            f"{path} has {len(tables)} *.tsv files", expected="one", mend="name the file"
        )
    if not path.is_file():
        raise CorpusError(f"{path} does not exist", expected="a TSV file with a header line")
    return path


def _language_columns(header: list[str], config: CorpusConfig) -> dict[str, str]:
    # `id` is a language code too, of one that halve does not know; `text` is no language.
    named = [
        (name.removeprefix(prefix), name)
        for name in header
        for prefix in ("", "text_", "translation_", "reference_")
        if name.startswith(prefix)
    ]
    found = by_language(named, "The header", config)
    targets = wanted_languages(found, config) if set(found) - {config.source_lang} else []
    columns = {lang: found[lang] for lang in targets}
    source = found.get(config.source_lang) or next((c for c in _TEXT_COLUMNS if c in header), None)
    return {**columns, **({config.source_lang: source} if source and columns else {})}


def _table_row(
    where: str,
    root: Path,
    record: Mapping[str, str],
    columns: dict[str, str],
    config: CorpusConfig,
) -> Row:
    number = where.rsplit(":", 1)[1]
    if "audio" in record and not record["audio"]:
        raise ValueError("the audio column is empty")
    split = record.get("split") or None
    if split is not None and split_name(split) is None:
        raise ValueError(f"split {split!r} is none of train, select (dev, valid) and test")
    source = next(
        (
            lang
            for lang, name in columns.items()
            if lang == config.source_lang or name in _TEXT_COLUMNS
        ),
        None,
    )
    return Row(
        where=where,
        id=record.get("id") or f"{int(number) - 1:06d}",
        audio=root / record["audio"] if "audio" in record else None,
        source_text=record[columns[source]] if source else "",
        references={lang: record[name] for lang, name in columns.items() if lang != source},
        offset_s=_seconds(record, "offset") or 0.0,
        duration_s=_seconds(record, "duration"),
        split=split_name(split) if split else None,
        group=record.get("group") or record.get("talk") or record.get("speaker") or None,
    )


def _seconds(record: Mapping[str, str], name: str) -> float | None:
    text = record.get(name) or record.get(f"{name}_s")
    return seconds(text, name) if text else None


def import_halve(source: str, config: CorpusConfig) -> Rows:
    """A corpus directory that halve (or demo/build_corpus.py) wrote."""
    corpus = read_corpus(Path(source))
    # Its manifest says what is spoken: the setting is for sources that do not.
    found = {lang for s in corpus.segments for lang in s.references if lang != s.source_lang}
    targets = wanted_languages(found, config.model_copy(update={"source_lang": ""}))
    manifest = corpus.path / "manifest.jsonl"
    rows = [
        Row(
            where=f"{manifest}:{number}",
            id=segment.id,
            audio=corpus.path / segment.audio if segment.audio else None,
            source_text=segment.source_text,
            references={
                lang: segment.references[lang] for lang in targets if lang in segment.references
            },
            offset_s=segment.offset_s,
            duration_s=segment.duration_s,
            source_lang=segment.source_lang,
            split=segment.split,
            group=segment.group,
            extra=segment.extra,
        )
        for number, segment in enumerate(corpus.segments, start=1)
    ]
    return Rows(rows)
