"""A report's table of other runtimes on the same weights."""

from collections.abc import Mapping, Sequence
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


def ratios_table(result: Mapping[str, Any], clip: str) -> Table | None:
    """How many times faster each model is than stock code, the best peer and its own unpruned like; None without peers."""
    if not result.get("peers"):
        return None
    models = result["models"]
    names = short_names([entry["path"] for entry in models])
    stock = [
        name
        for name in dict.fromkeys(entry["peer"] for entry in result["peers"])
        if name.startswith("transformers-")
    ]
    rows = [
        [
            names[entry["path"]],
            *(_times(entry.get("times_faster_than", {}).get(name, {}).get(clip)) for name in stock),
            _best(entry.get("best_installed_peer", {}).get(clip)),
            _pruning(entry, models, clip),
        ]
        for entry in models
    ]
    return Table(
        f"Times faster, {clip} clip, {result['threads']} thread(s) against the better of a peer's numbers of threads",
        ["model", *stock, "best peer that installs without compiling", "than the unpruned"],
        rows,
        note="A token, and end to end (RTF) where the peer hears. Stock code hears 30 s of padding; cut is stock code on "
        "audio that is cut as halve cuts it. Than the unpruned: than the model of most layers in the same precision.",
    )


def _times(found: Mapping[str, float] | None) -> str:
    return (
        ", ".join(f"{found[name]:.1f}" for name in ("tpot_ms", "rtf") if name in found)
        if found
        else ""
    )


def _best(found: Mapping[str, Any] | None) -> str:
    if not found or "tpot_ms" not in found:
        return ""
    return f"{found['tpot_ms']:.2f} ({found['peer']}, {found['threads']} threads)"


def _pruning(entry: Mapping[str, Any], models: Sequence[Mapping[str, Any]], clip: str) -> str:
    alike = [other for other in models if other["precision"] == entry["precision"]]
    whole = max(alike, key=lambda other: other["layers"] or 0)
    if not entry["layers"] or whole["layers"] == entry["layers"]:
        return ""
    ratios = [
        whole["clips"][clip][name]["p50"] / entry["clips"][clip][name]["p50"]
        for name in ("tpot_ms", "rtf")
        if entry["clips"][clip][name]["p50"]
    ]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


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
