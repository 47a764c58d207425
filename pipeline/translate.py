"""`halve translate`: one line a segment, in the order asked for."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from halve.audio import SAMPLE_RATE_HZ, FloatArray, probe, read_audio
from halve.checks import doubtful_lines, numbered
from halve.errors import CorpusError, InputError
from halve.families import SourceText
from halve.importers.base import read_lines, split_lines
from halve.importers.iwslt import FILE_ORDER, AudioIndex, Entry, in_file_order, read_segments_yaml
from halve.languages import language
from halve.progress import Progress
from halve.splitting import stretches

GROUP_S = 30.0
"""Audio of a row in the recordings that are read before any is translated: hour-long ones go a few at a time."""


@dataclass(frozen=True)
class Piece:
    """One stretch of audio that becomes one line."""

    name: str
    path: Path
    offset_s: float = 0.0
    duration_s: float | None = None


def pieces_of_files(files: Sequence[Path]) -> list[Piece]:
    """Whole files.

    Raises:
        CorpusError: any of them cannot be read; all of them are named.
    """
    return _checked([Piece(str(path), path) for path in files])


def pieces_of_segments(segments: Path, input_dir: Path | None) -> list[Piece]:
    """The segments of an organisers' YAML, talks in the order of FILE_ORDER where there is one.

    Args:
        segments: a YAML, or a directory with one YAML a talk and a FILE_ORDER, here or in `input_dir`.

    Raises:
        CorpusError: faulty entries or audio, all of them named; or several YAMLs in no order.
    """
    place = segments if segments.is_dir() else segments.parent
    folder = input_dir or place
    entries, faults = _entries(segments)
    for order in (folder / FILE_ORDER, place / FILE_ORDER):
        if order.is_file():
            entries, more = in_file_order(entries, order)
            faults += more
            break
    else:
        if segments.is_dir() and len({entry.wav for entry in entries}) > 1:
            raise CorpusError(
                f"{segments} says nothing of the order of its talks",
                expected=f"{FILE_ORDER} beside the YAMLs or in --input-dir, one talk a line",
            )
    if faults:
        raise CorpusError(f"{segments}: {len(faults)} faults", faults=faults)
    index = AudioIndex(folder)
    found = [
        Piece(entry.where, index.find(entry.wav, folder), entry.offset_s, entry.duration_s)
        for entry in entries
    ]
    return _checked(found)


def _entries(segments: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a segments YAML, or of all YAMLs of a directory, and the faults in them."""
    if not segments.is_dir():
        return read_segments_yaml(segments)
    yamls = sorted([*segments.glob("*.yaml"), *segments.glob("*.yml")])
    if not yamls:
        raise CorpusError(f"{segments} has no segments YAML", expected="one YAML a talk")
    read = [read_segments_yaml(path) for path in yamls]
    return [one for found, _ in read for one in found], [one for _, bad in read for one in bad]


def lines_of_files(files: Sequence[Path], source_lang: str) -> list[tuple[str, SourceText]]:
    """The lines of text files, standard input where none is named (or one is -), each with its place.

    Raises:
        CorpusError: a file cannot be read, or is not UTF-8.
        InputError: there is no line at all.
    """
    found: list[tuple[str, SourceText]] = []
    for file in files or [Path("-")]:
        if str(file) == "-":
            lines = _lines_of_stdin()
        elif file.is_dir():
            raise CorpusError(f"{file} is a folder", expected=f"text files, such as {file}/*.txt")
        elif file.exists():  # a pipe, too
            lines = read_lines(file)
        else:
            raise CorpusError(f"{file} does not exist", expected="a text file, one text a line")
        found += [
            (f"{file}:{number}", SourceText(line, source_lang))
            for number, line in enumerate(lines, start=1)
        ]
    if not found:
        raise InputError("Nothing to translate", mend="name text files, or give lines on stdin")
    return found


def _lines_of_stdin() -> list[str]:
    """As `read_lines`: text mode would take a carriage return inside a line for its end."""
    try:
        return split_lines(sys.stdin.buffer.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CorpusError(
            "-: not UTF-8", mend="convert the lines, for example with iconv"
        ) from None


def translate_lines(
    model: str,
    lang: str | None,
    lines: Sequence[tuple[str, SourceText]],
    batch_size: int,
    threads: int | None,
    progress: Progress,
    beams: int = 1,
    stop_loops: bool = False,
) -> "Iterator[Line]":
    """Translates texts in their order with a model that reads; an empty line stays empty.

    Raises:
        InputError: a language that the model does not speak.
    """
    from export.runtime import open_translator

    translator = open_translator(model, threads=threads, stop_loops=stop_loops, progress=progress)
    try:
        target = _language(lang, translator.languages)
        with progress.task("Translating", len(lines)) as advance:
            for start in range(0, len(lines), 4 * batch_size):
                batch = lines[start : start + 4 * batch_size]
                texts = [source for _, source in batch if source.text.strip()]
                found = iter(
                    translator.translate(texts, target, batch_size=batch_size, beams=beams)
                )
                for name, source in batch:
                    if not source.text.strip():
                        yield Line(name, "", 0.0)
                        continue
                    made = next(found)
                    yield Line(name, " ".join(made.text.split()), 0.0, made.stopped)
                advance(len(batch))
    finally:
        translator.close()


def _checked(pieces: list[Piece]) -> list[Piece]:
    if not pieces:
        raise InputError("Nothing to translate", mend="name audio files, or --segments FILE")
    faults: dict[str, None] = {}
    for piece in pieces:
        if what := _impossible(piece):
            faults[f"{piece.name}: {what}"] = None
            continue
        try:
            length_s = probe(piece.path).duration_s
        except CorpusError as error:
            faults[error.found if not error.mend else f"{error.found} ({error.mend})"] = None
            continue
        if piece.offset_s + (piece.duration_s or 0.0) > length_s + 0.5:
            faults[f"{piece.name}: ends past the end of {piece.path} ({length_s:.2f} s)"] = None
    if len(faults) == 1:
        raise CorpusError(next(iter(faults)))
    if faults:
        raise CorpusError(f"{len(faults)} audio files cannot be used", faults=list(faults))
    return pieces


def _impossible(piece: Piece) -> str:
    """Why there can be no such stretch; nothing where there can."""
    if not (math.isfinite(piece.offset_s) and piece.offset_s >= 0):
        return f"offset {piece.offset_s:g}, where 0 or more seconds are expected"
    length_s = piece.duration_s
    if length_s is not None and not (math.isfinite(length_s) and length_s > 0):
        return f"duration {length_s:g}, where more than 0 seconds are expected"
    return ""


@dataclass(frozen=True)
class Line:
    """A piece's translation."""

    name: str
    text: str
    duration_s: float
    stopped: str = "end"
    """Why its end is where it is; of a piece that was cut in several, the first that did not end by itself."""


def translate(
    model: str,
    lang: str | None,
    pieces: Sequence[Piece],
    batch_size: int,
    threads: int | None,
    progress: Progress,
    beams: int = 1,
    stop_loops: bool = False,
) -> Iterator[Line]:
    """Translates pieces in their order; longer ones than the model hears at once are cut in silence.

    Raises:
        InputError: a language that the model does not speak.
        CorpusError: audio that cannot be decoded; the pieces before it are translated first.
    """
    from export.runtime import open_translator

    translator = open_translator(model, threads=threads, stop_loops=stop_loops, progress=progress)
    try:
        target = _language(lang, translator.languages)
        with progress.task("Translating", len(pieces)) as advance:
            start = 0
            while start < len(pieces):
                # Several batches at once, so that the translator can put like lengths together.
                batch = pieces[start : start + 4 * batch_size]
                audio, fault = _read(batch, 4 * batch_size * GROUP_S)
                batch = batch[: len(audio)]
                start += len(batch)
                cuts = [audible(clip, translator.max_audio_s) for clip in audio]
                flat = [part for parts in cuts for part in parts]
                rows = (
                    translator.translate(flat, target, batch_size=batch_size, beams=beams)
                    if flat
                    else []
                )
                made = iter(rows)
                for piece, clip, parts in zip(batch, audio, cuts, strict=True):
                    found = [next(made) for _ in parts]
                    texts = [" ".join(each.text.split()) for each in found]
                    text = language(target).joiner.join(each for each in texts if each)
                    cut = next((each.stopped for each in found if each.stopped != "end"), "end")
                    yield Line(piece.name, text, len(clip) / translator.sample_rate_hz, cut)
                advance(len(batch))
                if fault is not None:
                    raise fault
    finally:
        translator.close()


def _read(pieces: Sequence[Piece], most_s: float) -> tuple[list[FloatArray], CorpusError | None]:
    """The pieces' audio up to the first that cannot be read, and why: those before it are translated first.

    Args:
        most_s: of audio; what would follow it is left to be read later.
    """
    audio: list[FloatArray] = []
    left_s = most_s
    for piece in pieces:
        if left_s <= 0:
            break
        try:
            audio.append(read_audio(piece.path, piece.offset_s, piece.duration_s))
        except CorpusError as error:
            return audio, error
        left_s -= len(audio[-1]) / SAMPLE_RATE_HZ
    return audio, None


def checked(
    lines: Iterable[Line], progress: Progress, lengths: Sequence[float] | None = None
) -> Iterator[Line]:
    """Hands lines on as they come; after the last one, warns of doubtful ones.

    Args:
        lengths: of the lines' sources, in characters; their seconds where None.
    """
    seen = []
    for line in lines:
        seen.append(line)
        yield line
    sizes = lengths if lengths is not None else [line.duration_s for line in seen]
    for fault in doubtful_lines([line.text for line in seen], sizes):
        progress.warn(fault)
    for stopped, why in (
        ("limit", "at the token limit"),
        ("loop", "in a repetition"),
    ):
        if cut := [place for place, line in enumerate(seen, 1) if line.stopped == stopped]:
            progress.warn(f"Cut {why}: line {numbered(cut)}")


def _language(lang: str | None, spoken: Sequence[str]) -> str:
    if lang is None and len(spoken) == 1:
        return spoken[0]
    if lang is None:
        raise InputError(
            "No target language was named", expected=f"--lang, one of {', '.join(spoken)}"
        )
    if lang not in spoken:
        raise InputError(
            f"The model does not translate into {lang!r}", expected=f"one of {', '.join(spoken)}"
        )
    return lang


def audible(audio: FloatArray, max_s: float) -> list[FloatArray]:
    """A recording as the server hears it: stretches cut at pauses, those of a long one that are silent left out.

    Args:
        audio: shape (samples,), 16 kHz.
    """
    parts = list(stretches([audio], max_s))
    if len(parts) == 1:
        return [audio]
    return [part.samples for part in parts if not part.is_silent]
