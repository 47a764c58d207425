"""Prunes the decoder of real Whisper base and measures it on the demo corpus.

    python -m demo.build_whisper --out runs/whisper-base
    python -m demo.measure_whisper --model runs/whisper-base --out runs/whisper

Two measurements, each with the language token of its target in the prompt. English: the model writes down
what it hears, which it was trained for; the references are the corpus's transcripts. German: Whisper
was never taught to translate into German; the number says what the token alone brings about, and is no
measure of a speech translator. Layers are ranked on `select`, in English, by chrF++; what is kept evenly
spaced (Distil-Whisper) stands beside. No student is tuned after pruning.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from compress.config import ImportanceConfig, PruneConfig
from compress.importance import run_importance
from compress.prune import run_prune
from halve import artefact, environment
from halve.corpus import read_corpus, write_manifest
from halve.json_files import write_json
from pipeline import console

DEMO = Path(__file__).parent / "corpus"
METHODS = ("exact", "spaced")
LANGS = ("en", "de")


def with_transcripts(out: Path) -> Path:
    """The demo corpus with each transcript as an English reference, in `out`; audio is linked."""
    corpus = read_corpus(DEMO)
    with artefact.writing(out, "corpus", {"made": "demo corpus with transcripts"}, 0, {}) as draft:
        for name in {segment.audio for segment in corpus.segments}:
            target = draft.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.hardlink_to((corpus.path / name).resolve())
        segments = [
            replace(each, references={**each.references, "en": each.source_text})
            for each in corpus.segments
        ]
        write_manifest(draft.path, segments)
    return out


def measure(model: Path, out: Path, remove: int, select: int, test: int) -> dict[str, Any]:
    """Ranks, prunes and scores; what is done already is not done again."""
    progress = console.progress()
    corpus = out / "corpus"
    if not (corpus / artefact.RECORD).is_file():
        with_transcripts(corpus)
    students, removed = {}, {}
    for method in METHODS:
        plan, student = out / f"importance-{method}", out / f"student-{method}"
        if not (plan / artefact.RECORD).is_file():
            config = ImportanceConfig(
                remove=remove, lang="en", method=method, segments=select, batch_size=select
            )
            run_importance(config, model, corpus, plan, progress)
        if not (student / artefact.RECORD).is_file():
            run_prune(PruneConfig(verify="full"), model, plan / "plan.json", student, progress)
        removed[method] = artefact.read(plan).extra["removed"]
        students[method] = student
    found: dict[str, Any] = {
        "command": "python -m demo.measure_whisper " + " ".join(sys.argv[1:]),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "select_segments": select,
        "removed": removed,
    }
    for lang in LANGS:
        # One run a student, so that a run cut off loses little.
        for method, student in students.items():
            results = out / f"quality-{lang}-{method}"
            if not (results / artefact.RECORD).is_file():
                config = QualityConfig(lang=lang, limit=test, controls=False)
                run_quality(config, model, [student], corpus, results, progress)
            quality = json.loads((results / "quality.json").read_text(encoding="utf8"))
            quality.pop("versions", None)
            found[f"{lang}-{method}"] = quality
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--remove", type=int, default=2)
    parser.add_argument("--select", type=int, default=24)
    parser.add_argument("--test", type=int, default=100)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(options.model, options.out, options.remove, options.select, options.test)
    write_json(options.out / "whisper.json", found)


if __name__ == "__main__":
    main()
