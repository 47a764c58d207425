"""Packages beside other runtimes on the same decoder, clip by clip in turns.

    python -m benchmarks.rivals --model demo/teacher --packages runs/latency/teacher-int4 --corpus demo/corpus --lang de \\
        --out runs/rivals-teacher

Every contender is a process that stays open; a round asks each of them once for each clip, in an order drawn anew. A
ratio is of two times of one round, so that what slows the machine for a while slows both: reported are the median over
rounds and its 95 % bootstrap interval.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.config import LatencyConfig
from benchmarks.latency import pinned_environment, timed_clips, without_ends, worker_command
from benchmarks.peer_names import PeerName
from benchmarks.peers import TextPeers
from benchmarks.turns import Contender
from halve.environment import machine, versions
from halve.json_files import write_json

PAUSE_S = 0.1
"""Between two turns: threads of the one before may still wait actively."""
RESAMPLES = 10_000
Rounds = dict[str, dict[str, list[float]]]
"""Milliseconds a token: {clip: {contender: [a round, ...]}}."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one contender is as another."""

    median: float
    low: float
    high: float
    """Bounds of the 95 % interval."""


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Median over rounds of theirs / ours, with a percentile bootstrap over rounds."""
    ratios = np.asarray(theirs) / np.asarray(ours)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def run_rounds(
    contenders: Mapping[str, Contender], clips: Sequence[str], rounds: int, warmup: int, seed: int
) -> Rounds:
    """Asks every contender for every clip once a round; the first `warmup` rounds do not count."""
    found: Rounds = {clip: {name: [] for name in contenders} for clip in clips}
    order = random.Random(seed)
    for number in track(range(rounds + warmup), "Rounds", console=Console(stderr=True)):
        for clip in clips:
            for name in order.sample(list(contenders), len(contenders)):
                time.sleep(PAUSE_S)
                timed = contenders[name].turn(clip)["tpot_ms"]
                if number >= warmup:
                    found[clip][name].append(timed)
    return found


def compared(rounds: Rounds, ours: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Ratios of each of ours to each of the others: {clip: {ours: {other: Ratio's fields}}}."""
    return {
        clip: {
            name: {
                other: vars(paired_ratio(timed[name], timed[other]))
                for other in timed
                if other not in ours
            }
            for name in ours
        }
        for clip, timed in rounds.items()
    }


def table(rounds: Rounds, ours: Sequence[str]) -> str:
    """The times, and ratios to the others with as many threads, in Markdown."""
    ratios = compared(rounds, ours)
    lines = []
    for clip, timed in rounds.items():
        lines += [
            f"## {clip} clip",
            "",
            "| a token, ms | median | times as fast as |",
            "|---|---|---|",
        ]
        for name in sorted(timed, key=lambda each: median(timed[each])):
            said = "; ".join(
                f"{_split(other)[0]} {each['median']:.2f} [{each['low']:.2f}, {each['high']:.2f}]"
                for other, each in ratios[clip].get(name, {}).items()
                if _split(other)[1] == _split(name)[1]
            )
            lines.append(f"| {name} | {median(timed[name]):.3f} | {said} |")
        lines.append("")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> tuple[Rounds, list[str]]:
    """Opens all contenders, times them, and says which are packages of halve's."""
    config = LatencyConfig(lang=given.lang, new_tokens=given.new_tokens)
    clips = timed_clips(config, given.corpus)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = {clip.name: str(clip.write(Path(folder))) for clip in clips}
        durations_s = {clip.name: clip.duration_s for clip in clips}
        peers = TextPeers(given.model, given.lang, durations_s, given.peer_folder)
        peers.prepare(given.peers, pinned_environment(None))
        contenders: dict[str, Contender] = {}
        ours = []
        for threads in given.threads:
            variables = pinned_environment(threads)
            shared = {"threads": threads, "new_tokens": given.new_tokens}
            for number, path in enumerate(given.packages):
                muted = without_ends(path, Path(folder, f"{number}-{threads}"), given.new_tokens)
                request = shared | {
                    "path": str(muted.resolve()),
                    "clips": files,
                    "lang": given.lang,
                }
                ours.append(_name(path.name, threads))
                contenders[ours[-1]] = Contender(worker_command(), request, variables)
                stack.callback(contenders[ours[-1]].close)
            for peer in given.peers:
                contender = peers.contender(peer, shared, variables)
                stack.callback(contender.close)
                contenders[_name(peer, threads)] = contender
        rounds = run_rounds(contenders, list(files), given.rounds, given.warmup, given.seed)
    return rounds, ours


def _name(what: str, threads: int) -> str:
    return f"{what}, {threads} thread{'s' if threads > 1 else ''}"


def _split(name: str) -> tuple[str, str]:
    """What `_name` has put together."""
    what, _, threads = name.partition(", ")
    return what, threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes rivals.json and rivals.md, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="whose decoder the peers run")
    parser.add_argument("--packages", type=Path, nargs="+", required=True, help="of that model")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=get_args(PeerName),
        default=["genai-int4", "genai-int4-block128", "genai-int4-kv8"],
    )
    parser.add_argument("--peer-folder", type=Path, default=Path("runs/peers"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the order within a round")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.new_tokens < 2 or len({path.name for path in given.packages}) < len(given.packages):
        parser.error("--new-tokens is at least 2, and packages have different names")
    rounds, ours = measure(given)
    given.out.mkdir(parents=True, exist_ok=True)
    page = table(rounds, ours)
    facts = {"machine": machine(), "versions": versions(), "new_tokens": given.new_tokens}
    result = facts | {"ms_per_token": rounds, "times_as_fast": compared(rounds, ours)}
    write_json(given.out / "rivals.json", result)
    (given.out / "rivals.md").write_text(page, encoding="utf8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
