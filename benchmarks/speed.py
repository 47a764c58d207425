"""What timings say about one another: times faster than others, and how near to memory's limit."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bandwidth import bandwidth_for

_BASELINE_METRICS = ("ttft_ms", "tpot_ms", "rtf")
_PEER_METRICS = ("tpot_ms", "rtf")


def add_limits(
    entry: dict[str, Any], rates: Mapping[int, float] | None, cache_bytes: int | None
) -> None:
    """Adds the time that reading the weights alone takes for a token, and the share of the time it is.

    Args:
        rates: bytes a second read from buffers by their size; nothing is added where None.
    """
    if not rates or not entry["weight_bytes"] or entry["device"] != "cpu":
        return
    weights = entry["weight_bytes"]
    rate = bandwidth_for(weights, rates)
    limit_ms = 1000 * weights / rate
    memory_ms = 1000 * weights / rates[max(rates)]
    entry["bandwidth_limit"] = {
        "fits_last_cache": cache_bytes is not None and weights <= cache_bytes,
        "bytes_per_s": round(rate),
        "limit_ms": round(limit_ms, 4),
        "main_memory_limit_ms": round(memory_ms, 4),
        "percent_of_limit": {
            clip: round(100 * limit_ms / timed["tpot_ms"]["p50"], 1)
            for clip, timed in entry["clips"].items()
            if timed["tpot_ms"]["p50"]
        },
    }


def compare(
    entry: dict[str, Any],
    baselines: Sequence[Mapping[str, Any]],
    peers: Sequence[Mapping[str, Any]],
) -> None:
    """Adds how many times faster a model is than the baseline and each peer, both at the threads that serve them best.

    Only those that compute where it does: a processor and a GPU say nothing about one another.
    """
    peers = [peer for peer in peers if peer["device"] == entry["device"]]
    baselines = [baseline for baseline in baselines if baseline["device"] == entry["device"]]
    if baselines:
        entry["times_faster_than_baseline"] = {
            clip: _ratios(baselines, entry, clip, _BASELINE_METRICS) for clip in entry["clips"]
        }
    if not peers:
        return
    names = list(dict.fromkeys(peer["peer"] for peer in peers))
    entry["times_faster_than"] = {
        name: {
            clip: best_ratios([peer for peer in peers if peer["peer"] == name], entry, clip)
            for clip in entry["clips"]
        }
        for name in names
    }
    installed = [peer for peer in peers if not peer["compiled"]]
    if installed:
        entry["best_installed_peer"] = {
            clip: _nearest(installed, entry, clip) for clip in entry["clips"]
        }


def best_ratios(
    peers: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], clip: str
) -> dict[str, float]:
    """One peer's p50 over the model's, at whichever thread count serves the peer better."""
    metrics = [metric for metric in _PEER_METRICS if metric in peers[0]["clips"][clip]]
    return _ratios(peers, entry, clip, metrics)


def _nearest(
    peers: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], clip: str
) -> dict[str, Any]:
    best = min(peers, key=lambda peer: peer["clips"][clip]["tpot_ms"]["p50"])
    faster = _ratios([best], entry, clip, ["tpot_ms"])
    return {"peer": best["peer"], "threads": best["threads"], **faster}


def _ratios(
    peers: Sequence[Mapping[str, Any]],
    entry: Mapping[str, Any],
    clip: str,
    metrics: Sequence[str],
) -> dict[str, float]:
    """The peers' least p50 over the model's; without what it has no time for, as it said nothing."""
    fast = {metric: float(entry["clips"][clip][metric]["p50"]) for metric in metrics}
    return {
        metric: round(min(peer["clips"][clip][metric]["p50"] for peer in peers) / fast[metric], 2)
        for metric in metrics
        if fast[metric]
    }
