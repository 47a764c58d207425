"""Rebuilds the demo corpus from Debian packages: LibreOffice help, read aloud by synthetic voices.

python demo/build_corpus.py [--out DIR]          the whole corpus
python demo/build_corpus.py --limit-train 2000   with less training speech
python demo/build_corpus.py --text-only FILE     no speech, only the triples
python demo/build_corpus.py --committed          the part in demo/corpus, from the whole
python demo/build_corpus.py --check              does demo/corpus match a fresh build?
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.ogg import encode  # noqa: E402
from demo.packages import PACKAGE_VERSION, fetch_help, require_voices  # noqa: E402
from demo.splits import Splits, split_triples  # noqa: E402
from demo.triples import Triple, extract_triples, spoken_form  # noqa: E402
from demo.voices import VOICES, choose_voice, speak  # noqa: E402
from halve.artefact import writing  # noqa: E402
from halve.audio import SAMPLE_RATE_HZ, decode_audio, pcm_sha256  # noqa: E402
from halve.corpus import Corpus, Segment, read_corpus, write_manifest  # noqa: E402
from halve.errors import CorpusError, HalveError  # noqa: E402
from halve.json_files import append_jsonl, read_jsonl  # noqa: E402

COMMITTED = ROOT / "demo" / "corpus"
DEFAULT_OUT = ROOT / "runs" / "demo-corpus"
DEFAULT_CACHE = ROOT / "runs" / "packages"
SEED = 0

# Longer sentences are translated in `select` and `test` alone: they cost training most.
MAX_TRAIN_WORDS = 20
COMMITTED_SIZES = {"select": 120, "test": 200, "train": 300}
COMMITTED_MAX_S = 8.0
COMMITTED_PER_VOICE = 8
# train is shuffled: its first segments are a fair sample, and a limited build has them too.
COMMITTED_FROM_TRAIN = 2000

Say = Callable[[str], None]


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


# --- text --------------------------------------------------------------------------------------


def load_splits(cache: Path, seed: int) -> Splits:
    """The text of the corpus, split by page."""
    return split_triples(list(extract_triples(fetch_help(cache))), seed)


def write_text(path: Path, splits: Splits) -> None:
    """One JSON line a triple: id, page, split, en, de, zh."""
    with path.open("w", encoding="utf-8") as file:
        for name, triples in _named(splits):
            for segment_id, triple in _numbered(name, triples):
                line = {"id": segment_id, "page": triple.page, "split": name}
                line |= {"en": triple.en, "de": triple.de, "zh": triple.zh}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _named(splits: Splits) -> list[tuple[str, list[Triple]]]:
    return [("select", splits.select), ("test", splits.test), ("train", splits.train)]


def _numbered(name: str, triples: Sequence[Triple]) -> Iterator[tuple[str, Triple]]:
    digits = 5 if name == "train" else 4
    for number, triple in enumerate(triples, 1):
        yield f"{name}-{number:0{digits}d}", triple


# --- speech ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """A segment that is still to be spoken."""

    id: str
    split: str
    triple: Triple

    @property
    def audio(self) -> str:
        """Path in the corpus; a folder holds at most a thousand files."""
        folder = self.split
        if self.split == "train":
            folder += f"/{int(self.id.split('-')[1]) // 1000:02d}"
        return f"audio/{folder}/{self.id}.opus"


def utterances(splits: Splits, limit_train: int | None = None) -> list[Utterance]:
    """What is to be spoken, in the manifest's order: select, test, train."""
    spoken = []
    for name, triples in _named(splits):
        chosen = [Utterance(key, name, triple) for key, triple in _numbered(name, triples)]
        if name == "train":
            chosen = [u for u in chosen if len(u.triple.en.split()) <= MAX_TRAIN_WORDS]
            chosen = chosen[:limit_train]
        spoken += chosen
    return spoken


def synthesise(utterance: Utterance, root: Path, seed: int) -> Segment:
    """Speaks one segment into its file under `root`, unless the file is there."""
    voice = choose_voice(utterance.id, utterance.split, seed)
    path = root / utterance.audio
    if not path.is_file():
        samples = speak(spoken_form(utterance.triple.en), voice, utterance.id, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        unfinished.write_bytes(encode(samples, utterance.id))
        unfinished.replace(path)
    with path.open("rb") as file:
        decoded = decode_audio(file, str(path))
    triple = utterance.triple
    return Segment(
        id=utterance.id,
        audio=utterance.audio,
        offset_s=0.0,
        duration_s=round(len(decoded) / SAMPLE_RATE_HZ, 6),
        source_lang="en",
        source_text=triple.en,
        references={"de": triple.de, "zh": triple.zh},
        split=utterance.split,
        group=triple.page,
        extra={"voice": voice.name, "pcm_sha256": pcm_sha256(decoded)},
    )


def synthesise_all(
    spoken: Sequence[Utterance], root: Path, seed: int, processes: int, report: Say = say
) -> Iterator[Segment]:
    """Speaks the segments with several processes and yields them in the order given."""
    task = partial(synthesise, root=root, seed=seed)
    with get_context("fork").Pool(processes) as pool:
        for done, segment in enumerate(pool.imap(task, spoken, chunksize=8), 1):
            if done % 500 == 0 or done == len(spoken):
                report(f"{done} of {len(spoken)} segments spoken")
            yield segment


# --- the whole corpus --------------------------------------------------------------------------


def build(out: Path, splits: Splits, seed: int, processes: int, limit_train: int | None) -> None:
    """Makes the corpus artefact in `out`; a killed build goes on where it stopped.

    Raises ArtefactError if `out` holds something else.
    """
    recipe: dict[str, Any] = _recipe() | {"limit_train": limit_train, "counts": splits.counts}
    spoken = utterances(splits, limit_train)
    with writing(out, "corpus", recipe, seed, {}) as draft:
        journal = draft.work / "segments.jsonl"
        done = len(read_jsonl(journal))
        started = time.monotonic()
        for segment in synthesise_all(spoken[done:], draft.path, seed, processes):
            append_jsonl(journal, segment.record())
        draft.timing("synthesis", time.monotonic() - started, segments=len(spoken) - done)
        segments = [_from_record(record) for record in read_jsonl(journal)]
        write_manifest(draft.path, segments)
        draft.extra = facts(segments)


def _from_record(record: dict[str, Any]) -> Segment:
    extra = {key: record.pop(key) for key in ("voice", "pcm_sha256")}
    return Segment(**record, extra=extra)


def _recipe() -> dict[str, Any]:
    return {
        "source": f"LibreOffice help {PACKAGE_VERSION}, spoken by espeak-ng and flite",
        "max_train_words": MAX_TRAIN_WORDS,
    }


def facts(segments: Iterable[Segment]) -> dict[str, Any]:
    """Segments, hours and voices of each split."""
    found: dict[str, Any] = {}
    by_split: dict[str, list[Segment]] = {}
    for segment in segments:
        by_split.setdefault(segment.split, []).append(segment)
    for name, members in sorted(by_split.items()):
        hours = sum(segment.duration_s for segment in members) / 3600
        voices = Counter(segment.extra["voice"] for segment in members)
        found[name] = {"segments": len(members), "hours": round(hours, 3), "voices": dict(voices)}
    return found


# --- the part in the repository ----------------------------------------------------------------


def choose_committed(segments: Sequence[Segment]) -> list[Segment]:
    """All of `select`, 200 of `test` and 300 of `train`: short ones, evenly spaced, every voice."""
    chosen: list[Segment] = []
    for split, size in COMMITTED_SIZES.items():
        members = [segment for segment in segments if segment.split == split]
        if split == "train":
            members = members[:COMMITTED_FROM_TRAIN]
        if split != "select":
            members = [segment for segment in members if segment.duration_s <= COMMITTED_MAX_S]
        chosen += _spread(members, size)
    return chosen


def _spread(members: list[Segment], size: int) -> list[Segment]:
    """`size` of the members in their order: a few of each voice, the rest evenly spaced."""
    if len(members) <= size:
        return members
    taken: set[int] = set()
    for voice in VOICES:
        of_voice = [n for n, member in enumerate(members) if member.extra["voice"] == voice.name]
        taken.update(of_voice[:COMMITTED_PER_VOICE])
    others = [number for number in range(len(members)) if number not in taken]
    wanted = size - len(taken)
    taken.update(others[step * len(others) // wanted] for step in range(wanted))
    return [members[number] for number in sorted(taken)]


def write_committed(whole: Corpus, out: Path, seed: int) -> None:
    """Copies the chosen part of the whole corpus to `out`, as a corpus of its own."""
    segments = choose_committed(whole.segments)
    with writing(out, "corpus", _recipe() | {"part": COMMITTED_SIZES}, seed, {}) as draft:
        for segment in segments:
            target = draft.path / segment.audio
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole.path / segment.audio, target)
        write_manifest(draft.path, segments)
        draft.extra = facts(segments)


def check(committed: Corpus, splits: Splits, seed: int, processes: int) -> None:
    """Speaks the committed segments afresh and compares them with the manifest.

    Raises CorpusError with one line for each segment that differs.
    """
    expected = {segment.id: segment for segment in committed.segments}
    spoken = [utterance for utterance in utterances(splits) if utterance.id in expected]
    faults = [f"{key}: not made any more" for key in expected.keys() - {u.id for u in spoken}]
    with tempfile.TemporaryDirectory() as folder:
        for segment in synthesise_all(spoken, Path(folder), seed, processes):
            wanted, found = expected[segment.id].record(), segment.record()
            differing = [key for key in wanted if wanted[key] != found.get(key)]
            if differing:
                faults.append(f"{segment.id}: differs in {', '.join(differing)}")
    if faults:
        raise CorpusError(f"{committed.path} differs from a fresh build", faults=sorted(faults))
    say(f"{len(spoken)} segments of {committed.path} are as a fresh build makes them")


# --- command line ------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rebuilds the demo corpus from Debian packages.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the whole corpus")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for the packages")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit-train", type=int, help="train segments to speak, all if not given")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--text-only", type=Path, metavar="FILE", help="write the triples, no speech")
    mode.add_argument("--committed", action="store_true", help="make demo/corpus from --out")
    mode.add_argument("--check", action="store_true", help="compare demo/corpus with a fresh build")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    if arguments.committed:
        write_committed(read_corpus(arguments.out), COMMITTED, arguments.seed)
        return
    splits = load_splits(arguments.cache, arguments.seed)
    for name, count in splits.counts.items():
        say(f"{name}: {count}")
    if arguments.text_only:
        write_text(arguments.text_only, splits)
        return
    require_voices()
    if arguments.check:
        check(read_corpus(COMMITTED), splits, arguments.seed, arguments.processes)
        return
    build(arguments.out, splits, arguments.seed, arguments.processes, arguments.limit_train)
    say(f"the corpus is in {arguments.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        run(_arguments(argv))
    except HalveError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
