"""A report's table of other runtimes on the same weights."""

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import Table, short_names


def peers_table(result: Mapping[str, Any], clip: str) -> Table | None:
    """Models and peers by time a token on one clip, fastest first; None where no peer was measured."""
    if not result.get("peers"):
        return None
    models = [*result["models"], *result.get("other_threads", ())]
    names = short_names(sorted({entry["path"] for entry in models}))
    entries = [(names[entry["path"]], entry) for entry in models]
    entries += [(f"{entry['peer']} (peer)", entry) for entry in result["peers"] if "clips" in entry]
    entries.sort(key=lambda entry: entry[1]["clips"][clip]["tpot_ms"]["p50"])
    rows = [_row(name, entry, clip) for name, entry in entries]
    missing = [entry["peer"] for entry in result["peers"] if "clips" not in entry]
    duration_s = result["clips"][clip]["duration_s"]
    return Table(
        f"Other runtimes, {clip} clip, {duration_s:.1f} s, {result['new_tokens']} tokens",
        [
            "runtime",
            "precision",
            "threads",
            "what runs",
            "a token ms",
            "RTF",
            "% of bandwidth's limit",
        ],
        rows,
        note="p50. Peers that run text only take the prompt with the clip's positions as tokens, and have no RTF. "
        "The limit: bytes of weights read for a token over the bandwidth measured on so many bytes."
        + (f" Not measured: {', '.join(missing)}." if missing else ""),
    )


def _row(name: str, entry: Mapping[str, Any], clip: str) -> list[str]:
    timed = entry["clips"][clip]
    limit = entry.get("bandwidth_limit") or {}
    share = limit.get("percent_of_limit", {}).get(clip)
    whole = entry.get("whole", True)
    return [
        name,
        entry["precision"],
        str(entry["threads"]),
        "audio and text" if whole else "text only",
        f"{timed['tpot_ms']['p50']:.2f}",
        f"{timed['rtf']['p50']:.3f}" if whole and "rtf" in timed else "",
        f"{share:.0f}" if share is not None else "",
    ]
