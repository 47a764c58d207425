"""The importer of Hugging Face data sets: from the hub, or a local folder."""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from halve.errors import CorpusError, MissingExtraError
from halve.importers.base import (
    CorpusConfig,
    Row,
    Rows,
    Sound,
    by_language,
    split_of_set,
    wanted_languages,
)


def import_hf(source: str, config: CorpusConfig) -> Rows:
    """A Hugging Face data set: a hub id, or a local folder or `save_to_disk` directory.

    Audio is taken as the bytes that the data set holds, not decoded and written again; where it holds paths,
    they are relative to the source; samples that it holds decoded become WAV files of the same samples.

    Raises:
        MissingExtraError: the package `datasets` is not there.
        CorpusError: the data set cannot be read, or lacks a column.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train") from None
    found = Rows()
    parts = _load(datasets, source, config)
    for part, table in parts.items():
        # A table alone is called train by whoever loads it, and no split is meant.
        split = None if set(parts) == {"train"} else split_of_set(part)
        columns = _checked_columns(source, list(table.column_names), config)
        undecoded = _undecoded(datasets, source, table, config)
        for index, record in enumerate(undecoded):
            where, ident = f"{source}:{part}:{index}", f"{part}-{index:06d}"
            try:
                fetch = partial(_bytes_of, undecoded, index, config.audio_column)
                audio = _sound(record[config.audio_column], ident, Path(source), fetch)
                found.rows.append(_row(where, ident, split, record, audio, columns, config))
            except ValueError as error:
                found.faults.append(f"{where}: {error}")
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
        causes = list(_causes(error))
        if any(isinstance(cause, ImportError) and "torchcodec" in str(cause) for cause in causes):
            raise CorpusError(
                f"The data set {source} is a folder of audio files, which `datasets` reads with torchcodec only",
                expected="the package torchcodec",
                mend="pip install torchcodec, or save the metadata as a TSV with an `audio` column and use --format tsv",
            ) from None
        # The outermost says no more than "an error occurred"; what it was is at the root.
        raise CorpusError(
            f"The data set {source} cannot be read ({' '.join(str(causes[-1]).split())[:300]})",
            expected="a local directory, or the id of a data set on the hub",
            mend="check the id, the network, and for gated data `hf auth login`",
        ) from None
    return loaded if hasattr(loaded, "keys") else {"train": loaded}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it was raised from, as its library chained them."""
    while error is not None:
        yield error
        error = error.__cause__


def _checked_columns(source: str, having: list[str], config: CorpusConfig) -> dict[str, str]:
    before, _, after = config.text_column.partition("{lang}")
    if "{lang}" not in config.text_column:
        raise CorpusError(
            f"--text-column {config.text_column} names one column",
            expected="a pattern that gives each language's, such as text_{lang} or {lang}",
            mend="put {lang} where the columns have the language's code",
        )
    named = [
        (name[len(before) : len(name) - len(after) or None], name)
        for name in having
        if name.startswith(before) and name.endswith(after)
    ]
    columns = by_language(named, source, config)
    if config.audio_column not in having or not set(columns) - {config.source_lang}:
        raise CorpusError(
            f"{source} has the columns {', '.join(having)}",
            expected=f"audio in {config.audio_column!r} and text in {config.text_column!r}",
            mend="name them with --audio-column and --text-column",
        )
    if config.group_column is not None and config.group_column not in having:
        raise CorpusError(
            f"{source} has no column {config.group_column!r}",
            expected=f"one of {', '.join(having)}",
            mend="name another one with --group-column, or leave the option out",
        )
    targets = wanted_languages(columns, config)
    return {lang: columns[lang] for lang in [config.source_lang, *targets] if lang in columns}


def _undecoded(datasets: Any, source: str, table: Any, config: CorpusConfig) -> Any:
    """The table with its audio as bytes or paths.

    Raises:
        CorpusError: the audio column holds neither.
    """
    feature = table.features[config.audio_column]
    if isinstance(feature, datasets.Audio):
        return table.cast_column(config.audio_column, datasets.Audio(decode=False))
    if isinstance(feature, Mapping) and {"bytes", "path", "array"} & set(feature):
        return table
    if getattr(feature, "dtype", "") in ("string", "large_string", "binary", "large_binary"):
        return table
    raise CorpusError(
        f"The column {config.audio_column!r} of {source} holds {feature}",
        expected="audio, the bytes of audio files, their paths, or samples as `array` with `sampling_rate`",
        mend="name another column with --audio-column",
    )


def _row(
    where: str,
    ident: str,
    split: str | None,
    record: Mapping[str, Any],
    audio: Path | Sound,
    columns: dict[str, str],
    config: CorpusConfig,
) -> Row:
    texts: dict[str, str] = {}
    for lang, name in columns.items():
        text = record[name]
        if not isinstance(text, str | None):
            raise ValueError(f"{name} is {str(text)[:40]!r} ({type(text).__name__}), not a text")
        texts[lang] = (text or "").strip()
    group = record[config.group_column] if config.group_column else None
    return Row(
        where=where,
        id=ident,
        audio=audio,
        source_text=texts.pop(config.source_lang, ""),
        references=texts,
        split=split,
        # Not known who speaks: a group of its own, as in a data set that names none.
        group=ident if group is None or str(group).strip() == "" else str(group),
    )


def _sound(cell: Any, ident: str, root: Path, fetch: Callable[[], bytes]) -> Path | Sound:
    """A cell's audio: its path, or what fetches its bytes again, so that they are not held.

    Raises:
        ValueError: there is no path, no byte and no sample.
    """
    data, path = _audio_file(cell)
    if data:
        return Sound(f"{ident}{Path(path).suffix or '.wav'}", fetch, len(data))
    if not path:
        raise ValueError("no audio")
    return root / path


def _bytes_of(table: Any, index: int, column: str) -> bytes:
    return _audio_file(table[index][column])[0]


def _audio_file(cell: Any) -> tuple[bytes, str]:
    """The bytes that a cell holds, as an audio file, and the path that it names; what is not there is empty.

    Raises:
        ValueError: samples that make no file.
    """
    if isinstance(cell, str):
        return b"", cell
    if isinstance(cell, bytes):
        return cell, ""
    audio = cell or {}
    data, path = audio.get("bytes"), audio.get("path")
    if not data and audio.get("array") is not None:
        return _samples(audio["array"], audio.get("sampling_rate")), ""
    return data or b"", path or ""


def _samples(array: Any, rate_hz: Any) -> bytes:
    """Decoded samples as a WAV file: whole numbers are 16-bit ones, others have the range -1 to 1.

    Raises:
        ValueError: they are no single channel of samples, or their rate is not known.
    """
    samples = np.asarray(array)
    if not isinstance(rate_hz, int) or rate_hz <= 0:
        raise ValueError(f"sampling_rate is {rate_hz!r}, not a number of samples a second")
    if samples.ndim != 1 or samples.dtype.kind not in "if":
        raise ValueError(f"array has the shape {samples.shape}, not (samples,) of one channel")
    is_whole = samples.dtype.kind == "i"
    if is_whole and len(samples) and (samples.min() < -(1 << 15) or samples.max() >= 1 << 15):
        raise ValueError("array holds whole numbers of more than 16 bits")
    file = io.BytesIO()
    kind, subtype = (np.int16, "PCM_16") if is_whole else (np.float32, "FLOAT")
    soundfile.write(file, samples.astype(kind), rate_hz, format="WAV", subtype=subtype)
    return file.getvalue()
