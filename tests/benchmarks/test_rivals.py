"""Timings in turns, and what is said of them."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.config import LatencyConfig
from benchmarks.latency import pinned_environment, timed_clips, without_ends, worker_command
from benchmarks.latency_worker import _exact_run
from benchmarks.peer_tables import ratios_table
from benchmarks.rivals import paired_ratio, run_rounds, table
from benchmarks.speed import compare
from benchmarks.turns import Contender
from export.runtime import open_translator

WORKER = """
import sys
from benchmarks.turns import answer_turns
sys.stdin.readline()
times = iter([3.0, 5.0])
answer_turns(lambda clip: {"tpot_ms": next(times), "long": clip == "long"}, sys.stdout)
"""


def test_a_slow_hour_makes_no_ratio() -> None:
    """Both are three times slower in some rounds: times spread, ratios do not."""
    moods = [1.0, 3.0, 1.1, 2.9, 1.0, 0.9, 3.1, 1.0]
    ours = [0.5 * mood for mood in moods]
    ratio = paired_ratio(ours, [0.6 * mood for mood in moods])
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.2, 1.2, 1.2))
    mixed = paired_ratio([1.0] * 9, [1.0, 1.0, 1.0, 1.0, 1.2, 1.4, 1.4, 1.4, 1.4])
    assert mixed.median == pytest.approx(1.2)
    assert mixed.low < 1.2 < mixed.high


def test_contenders_take_turns() -> None:
    command = [sys.executable, "-c", WORKER]
    with closing(Contender(command, {}, pinned_environment(1))) as contender:
        assert contender.turn("short") == {"tpot_ms": 3.0, "long": False}
        rounds = run_rounds({"x": contender}, ["long"], rounds=1, warmup=0, seed=0)
        assert rounds == {"long": {"x": [5.0]}}
        with pytest.raises(RuntimeError, match="exit status 1"):
            contender.turn("short")


def test_a_model_says_every_token_in_its_turn(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    (clip, _) = timed_clips(LatencyConfig(lang="de", new_tokens=5), tiny_corpus)
    muted = without_ends(tiny_model, tmp_path / "muted", 5)
    request = {
        "path": str(muted),
        "clips": {"short": str(clip.write(tmp_path))},
        "lang": "de",
        "threads": 1,
        "new_tokens": 5,
    }
    with closing(Contender(worker_command(), request, pinned_environment(1))) as contender:
        timed = contender.turn("short")
    assert timed["ttft_ms"] > 0
    assert timed["tpot_ms"] > 0
    timing = _exact_run(open_translator(muted, threads=1), "de")(clip.samples, 5)
    assert timing.tokens == 5
    assert timing.total_s > timing.first_s > 0


def test_the_fastest_stands_first_with_its_ratios() -> None:
    timed = {
        "genai, 1 thread": [0.6, 0.61, 0.4],
        "genai, 2 threads": [0.7, 0.7, 0.7],
        "ours, 1 thread": [0.5, 0.9, 0.52],
    }
    lines = table({"short": timed}, ["ours, 1 thread"]).splitlines()
    assert lines[4] == "| ours, 1 thread | 0.520 | genai 0.77 [0.68, 1.20] |"
    assert lines[5] == "| genai, 1 thread | 0.600 |  |"


def test_ratios_say_what_pruning_adds_and_which_peer_is_next() -> None:
    def timed(tpot_ms: float, rtf: float, **facts: object) -> dict[str, Any]:
        clips = {"short": {"tpot_ms": {"p50": tpot_ms}, "rtf": {"p50": rtf}}}
        return {"clips": clips, "weight_bytes": 1, "device": "cpu", "precision": "int4", **facts}

    models = [
        timed(2.0, 0.2, path="whole", layers=12),
        timed(1.0, 0.16, path="nine", layers=9),
    ]
    peers = [
        timed(8.0, 0.8, peer="transformers-fp32", threads=1, compiled=False),
        timed(6.0, 0.7, peer="transformers-fp32", threads=2, compiled=False),
        timed(2.2, 0.0, peer="genai-int4", threads=2, compiled=False),
    ]
    del peers[2]["clips"]["short"]["rtf"]
    for model in models:
        compare(model, [], peers)
    table = ratios_table({"models": models, "peers": peers, "threads": 1}, "short")
    assert table is not None
    assert table.rows == [
        ["whole", "3.0, 3.5", "1.10 (genai-int4, 2 threads)", ""],
        ["nine", "6.0, 4.4", "2.20 (genai-int4, 2 threads)", "2.00, 1.25"],
    ]
