"""The latency bench on small real models, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import size
from benchmarks.config import LatencyConfig
from benchmarks.latency import percentiles, pinned_environment, run_latency
from halve.errors import ArtefactError


def test_every_key_and_positive_numbers(
    tiny_student: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = LatencyConfig(lang="de", repeats=2, warmup=1, short_s=1.0, long_s=3.0)
    run_latency(config, [tiny_student], tiny_corpus, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert result["threads"] == 1
    assert [entry["layers"] for entry in result["models"]] == [4]
    assert result["baseline"]["path"] == str(tiny_student)
    assert result["clips"]["long"]["duration_s"] > result["clips"]["short"]["duration_s"]
    for entry in [result["baseline"], *result["models"]]:
        assert entry["precision"] == "fp32"
        assert entry["load_s"] > 0
        assert entry["peak_memory_bytes"] > entry["before_load_bytes"] > 10_000_000
        for timed in (entry, *entry["clips"].values()):
            for metric in ("ttft_ms", "tpot_ms", "rtf"):
                assert 0 < timed[metric]["p50"] <= timed[metric]["p95"]
    # Stock transformers hears 30 s of padding: another road to the same tokens.
    short = [entry["clips"]["short"] for entry in (result["baseline"], result["models"][0])]
    assert short[0]["text"] == short[1]["text"]
    assert set(result["models"][0]["times_faster_than_baseline"]["short"]) == {
        "ttft_ms",
        "tpot_ms",
        "rtf",
    }


def test_a_path_without_a_model_is_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        run_latency(LatencyConfig(lang="de"), [tmp_path / "nothing"], tiny_corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_threads_are_pinned_for_the_measured_process() -> None:
    variables = pinned_environment(3)
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["PYTHONPATH"].split(":")[0] == str(Path(__file__).parents[2])


def test_percentiles_of_a_known_series() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"p50": 3.0, "p95": 4.8}


def test_peak_memory_is_this_process_s_own() -> None:
    # In a process of its own: one that has run other tests may have had its peak long ago.
    script = (
        "from benchmarks import memory\n"
        "before = memory.peak_memory_bytes()\n"
        "block = bytearray(before + 50_000_000 - memory.resident_memory_bytes())\n"
        "block[::4096] = b'x' * len(block[::4096])\n"
        "print(memory.peak_memory_bytes() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 30_000_000 <= int(done.stdout) < 200_000_000


def test_sizes_count_bytes_and_weights_apart(tiny_model: Path) -> None:
    measured = size.measure(tiny_model)
    stored = sum(file.stat().st_size for file in tiny_model.iterdir())
    assert measured.stored_bytes == stored
    tensors = [
        entry
        for file in tiny_model.glob("*.safetensors")
        for entry in size.safetensors_header(file).values()
    ]
    weights = sum((entry["data_offsets"][1] - entry["data_offsets"][0]) // 4 for entry in tensors)
    assert size.logical_parameters(tiny_model) == weights
    assert measured.bits_per_weight == pytest.approx(8 * stored / weights)


def test_a_log_of_times_is_no_part_of_the_size(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345")
    (tmp_path / "timings.jsonl").write_bytes(b"0123456789")
    assert size.stored_bytes(tmp_path) == 5
