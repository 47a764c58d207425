"""Puts the results of recovery.sh side by side.

    python -m benchmarks.recovery runs/recovery      (bash benchmarks/recovery.sh runs it at the end)

Writes recovery.json and README.md into the folder: each way's best score on `select`, by seed and on average.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from halve.artefact import RECORD, TIMINGS, Artefact, read
from halve.errors import ArtefactError
from halve.json_files import read_jsonl, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads FOLDER/tuned, writes the table, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    result = collect(folder)
    write_json(folder / "recovery.json", result)
    page = table(result)
    (folder / "README.md").write_text(page, encoding="utf8")
    print(page)
    return 0


def collect(folder: Path) -> dict[str, Any]:
    """What each run scored, by way and seed.

    Raises:
        ArtefactError: no run is there.
    """
    runs = [read(path.parent) for path in sorted(folder.glob(f"tuned/*/{RECORD}"))]
    if not runs:
        raise ArtefactError(
            f"{folder} holds no tuned models", mend="bash benchmarks/recovery.sh makes them"
        )
    ways: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        name = run.path.name.rpartition("-")[0]
        ways.setdefault(name, []).append(_facts(run))
    return {"shared": take_shared([run for runs in ways.values() for run in runs]), "ways": ways}


def take_shared(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Takes what all runs have alike out of their settings, versions and machines, and returns it."""
    shared: dict[str, dict[str, Any]] = {}
    for part in ("recipe", "versions", "machine"):
        first = dict(runs[0][part])
        shared[part] = {
            key: value
            for key, value in first.items()
            if all(key in run[part] and run[part][key] == value for run in runs)
        }
        for run in runs:
            run[part] = {key: value for key, value in run[part].items() if key not in shared[part]}
    return shared


def _facts(run: Artefact) -> dict[str, Any]:
    extra = run.extra
    facts = {
        key: extra[key]
        for key in ("score", "untuned_score", "steps", "best_step", "method", "rows")
    }
    timings = read_jsonl(run.path / TIMINGS)
    seconds = [line["seconds"] for line in timings if line["event"] == "training"]
    where = [line for line in timings if line["event"] == "stage"][-1]
    return {
        "seed": run.seed,
        **facts,
        "recipe": run.recipe,
        "training_s": sum(seconds),
        # Runs may have been made in different places.
        "machine": {key: where[key] for key in ("cpu", "cores", "gpu", "date") if key in where},
        "versions": run.versions,
    }


def table(result: dict[str, Any]) -> str:
    """The comparison as Markdown, best first."""
    lines = [
        "Best score on `select` of each run.",
        "",
        "| way | untuned | mean | by seed | steps | minutes of training |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(
        result["ways"].items(), key=lambda way: -mean(run["score"] for run in way[1])
    ):
        scores = [run["score"] for run in sorted(runs, key=lambda run: run["seed"])]
        minutes = mean(run["training_s"] for run in runs) / 60
        shown = ", ".join(f"{score:.2f}" for score in scores)
        lines.append(
            f"| {name} | {_untuned(runs)} | {mean(scores):.2f} | {shown} "
            f"| {runs[0]['steps']} | {minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _untuned(runs: list[dict[str, Any]]) -> str:
    """The score before training; from the lowest to the highest where a seed chooses the layers, too."""
    found = sorted({f"{run['untuned_score']:.2f}" for run in runs}, key=float)
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


if __name__ == "__main__":
    raise SystemExit(main())
