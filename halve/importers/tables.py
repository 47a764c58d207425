"""Importers of tables: TSV, a Hugging Face data set, and a corpus that halve wrote."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from halve.corpus import read_corpus
from halve.errors import CorpusError, MissingExtraError
from halve.importers.base import (
    CorpusConfig,
    Row,
    Rows,
    Sound,
    known_language,
    read_lines,
    split_name,
    wanted_languages,
)

_TEXT_COLUMNS = ("text", "source_text", "transcript", "sentence")


def import_tsv(source: str, config: CorpusConfig) -> Rows:
    """A table with a header line: audio, the translations (de, text_de or translation_de) and, where there
    are any, id, offset, duration, text, split, group. Audio paths are relative to the table. A table of
    plain text has no audio column, and the source's text instead.

    Raises:
        CorpusError: no table, or one without the columns that a corpus needs.
    """
    path = _table(Path(source))
    lines = read_lines(path)
    # Texts hold quotation marks: a TSV has no quoting.
    rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter="\t", quoting=csv.QUOTE_NONE))
    header = [name.strip().lower() for name in rows[0]] if rows else []
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
    for number, cells in enumerate(rows[1:], start=2):
        where = f"{path}:{number}"
        if not any(cell.strip() for cell in cells):
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
    found: dict[str, str] = {}
    for name in header:
        for prefix in ("", "text_", "translation_", "reference_"):
            rest = name.removeprefix(prefix)
            code = known_language(rest) if name.startswith(prefix) and rest.isalpha() else None
            # `id` is a language code too, of one that halve does not know; `text` is no language.
            if code:
                found.setdefault(code, name)
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
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is no number of seconds") from None


def import_hf(source: str, config: CorpusConfig) -> Rows:
    """A Hugging Face data set: a hub id, or a local folder or `save_to_disk` directory.

    Audio is taken as the bytes that the data set holds, not decoded and written again.

    Raises:
        MissingExtraError: the package `datasets` is not there.
        CorpusError: the data set cannot be read, or lacks a column.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train") from None
    parts = _load(datasets, source, config)
    found = Rows()
    for part, table in parts.items():
        columns = _checked_columns(source, table.column_names, config)
        undecoded = table.cast_column(config.audio_column, datasets.Audio(decode=False))
        for index, record in enumerate(undecoded):
            found.rows.append(_hf_row(source, part, index, record, columns, config))
    return found


def _load(datasets: Any, source: str, config: CorpusConfig) -> Mapping[str, Any]:
    try:
        if (Path(source) / "state.json").is_file() or (
            Path(source) / "dataset_dict.json"
        ).is_file():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, config.subset)
    except Exception as error:  # the library raises a dozen kinds, all of them "cannot be read"
        raise CorpusError(
            f"The data set {source} cannot be read ({' '.join(str(error).split())[:300]})",
            expected="a local directory, or the id of a data set on the hub",
            mend="check the id, the network, and for gated data `hf auth login`",
        ) from None
    return loaded if hasattr(loaded, "keys") else {"train": loaded}


def _checked_columns(source: str, names: Iterable[str], config: CorpusConfig) -> dict[str, str]:
    having = list(names)
    before, _, after = config.text_column.partition("{lang}")
    columns = {
        code: name
        for name in having
        if name.startswith(before)
        and name.endswith(after)
        and (code := known_language(name[len(before) : len(name) - len(after) or None]))
    }
    if config.audio_column not in having or not set(columns) - {config.source_lang}:
        raise CorpusError(
            f"{source} has the columns {', '.join(having)}",
            expected=f"audio in {config.audio_column!r} and text in {config.text_column!r}",
            mend="name them with --audio-column and --text-column",
        )
    targets = wanted_languages(columns, config)
    return {lang: columns[lang] for lang in [config.source_lang, *targets] if lang in columns}


def _hf_row(
    source: str,
    part: str,
    index: int,
    record: Mapping[str, Any],
    columns: dict[str, str],
    config: CorpusConfig,
) -> Row:
    audio = record[config.audio_column] or {}
    ident = f"{part}-{index:06d}"
    texts = {lang: str(record[name] or "").strip() for lang, name in columns.items()}
    sound: Path | Sound
    if audio.get("bytes"):
        suffix = Path(audio.get("path") or "").suffix or ".wav"
        sound = Sound(f"{ident}{suffix}", audio["bytes"])
    else:
        sound = Path(audio.get("path") or f"{ident}: no audio")
    group = str(record[config.group_column]) if config.group_column else None
    return Row(
        where=f"{source}:{part}:{index}",
        id=ident,
        audio=sound,
        source_text=texts.pop(config.source_lang, ""),
        references=texts,
        split=split_name(part),
        group=group or ident,
    )


def import_halve(source: str, config: CorpusConfig) -> Rows:
    """A corpus directory that halve (or demo/build_corpus.py) wrote."""
    corpus = read_corpus(Path(source))
    targets = wanted_languages({lang for s in corpus.segments for lang in s.references}, config)
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
            split=segment.split,
            group=segment.group,
            extra=segment.extra,
        )
        for number, segment in enumerate(corpus.segments, start=1)
    ]
    return Rows(rows)
