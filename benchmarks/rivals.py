"""The rounds of `latency_peers.sh rivals` as one table: medians over rounds of each round's p50.

python -m benchmarks.rivals runs/latency-peers
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from halve.errors import ArtefactError
from halve.json_files import read_json, write_json


def collect(folder: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Milliseconds a token of each round: {shape: {clip: {"NAME, N threads": [a round, ...]}}}.

    Raises:
        ArtefactError: no round is there.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for path in sorted(folder.glob("rivals-*-*/latency.json")):
        shape = path.parent.name.split("-")[1]
        result = read_json(path)
        for entry in [*result["models"], *result["other_threads"], *result["peers"]]:
            name = f"{entry.get('peer') or Path(entry['path']).name}, {entry['threads']} threads"
            for clip, timed in entry["clips"].items():
                of_clip = found.setdefault(shape, {}).setdefault(clip, {})
                of_clip.setdefault(name, []).append(timed["tpot_ms"]["p50"])
    if not found:
        raise ArtefactError(
            f"{folder} holds no rounds", mend="bash benchmarks/latency_peers.sh rivals"
        )
    return found


def table(found: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Fastest first, by shape and clip."""
    lines = []
    for shape, clips in found.items():
        for clip, names in clips.items():
            lines += [
                f"## {shape}, {clip} clip",
                "",
                "| runtime | a token ms, median of rounds | by round |",
                "|---|---|---|",
            ]
            for name, values in sorted(names.items(), key=lambda each: median(each[1])):
                shown = ", ".join(f"{value:.3f}" for value in values)
                lines.append(f"| {name} | {median(values):.3f} | {shown} |")
            lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    found: dict[str, Any] = collect(folder)
    write_json(folder / "rivals.json", found)
    page = table(found)
    (folder / "rivals.md").write_text(page, encoding="utf8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
