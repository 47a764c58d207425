"""The latency bench on small real models, each in a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import latency_worker, size, speed
from benchmarks.config import LatencyConfig
from benchmarks.latency import percentiles, pinned_environment, run_latency
from halve import artefact, environment
from halve.errors import ArtefactError, InputError
from halve.families import FAMILIES
from halve.translate import Translation
from pipeline import steps
from serve.models import find_models
from serve.settings import ServeSettings
from tests.families import text_models
from tests.importing import Heard


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
    others = result["baseline_other_threads"]
    assert [entry["threads"] for entry in others] == [2] * (environment.cores() > 1)
    for entry in [result["baseline"], *others, *result["models"]]:
        assert entry["precision"] == "fp32"
        assert entry["load_s"] > 0
        assert entry["peak_memory_bytes"] > entry["before_load_bytes"] > 10_000_000
        for timed in (entry, *entry["clips"].values()):
            for metric in ("ttft_ms", "tpot_ms", "rtf"):
                assert 0 < timed[metric]["p50"] <= timed[metric]["p95"]
    assert {each["device"] for each in (result["baseline"], *result["models"])} == {"cpu"}
    # Stock transformers hears 30 s of padding: another road to the same tokens.
    short = [entry["clips"]["short"] for entry in (result["baseline"], result["models"][0])]
    assert short[0]["text"] == short[1]["text"]
    assert short[0]["tokens"] == short[1]["tokens"]
    assert set(result["models"][0]["times_faster_than_baseline"]["short"]) == {
        "ttft_ms",
        "tpot_ms",
        "rtf",
    }


def test_a_baseline_without_room_costs_no_other_s_times(
    tiny_student: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "weights_room", lambda device: 0)
    config = LatencyConfig(lang="de", repeats=2, warmup=1, short_s=1.0, long_s=1.5)
    progress = Heard()
    run_latency(config, [tiny_student], tiny_corpus, tmp_path / "out", progress)
    result = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert result["baseline"] is None and len(result["models"]) == 1
    assert "no room here" in result["baseline_note"] and "no baseline" in progress.warnings[0]
    step = steps.latency(config, [tiny_student], tiny_corpus, tmp_path / "out")
    assert steps.up_to_date(step)


@pytest.mark.parametrize(("stopped", "tokens"), [("end", 3), ("limit", 2), ("loop", 2)])
def test_the_token_that_ends_a_text_counts(stopped: str, tokens: int) -> None:
    """Its step is in the whole time, and stock `generate` hands it over as well."""

    def stream(*_: object, limit: int) -> Generator[str, None, Translation]:
        yield "Die"
        yield " Datei"
        return Translation("Die Datei", [7, 8], stopped)

    words = {7: "Die", 8: " Datei"}

    def text(tokens: list[int]) -> str:
        return "".join(words[each] for each in tokens)

    translator = SimpleNamespace(stream=stream, text=text)
    timing = latency_worker._stream_run(translator, "de")(np.zeros(9), 5)
    assert timing.tokens == tokens
    assert timing.token_s == (timing.total_s - timing.first_s) / (tokens - 1)


def test_a_first_character_of_several_tokens_is_no_gain() -> None:
    """Bytes of one character: text stands after the third of five steps."""
    said = [1, 2, 3, 4]
    shown = {1: "\ufffd", 2: "\ufffd", 3: "\u5f00", 4: "\u5f00\u59cb"}

    def stream(*_: object, limit: int) -> Generator[str, None, Translation]:
        yield "\u5f00"
        yield "\u59cb"
        return Translation("\u5f00\u59cb", said, "end")

    translator = SimpleNamespace(stream=stream, text=lambda tokens: shown[len(tokens)])
    timing = latency_worker._stream_run(translator, "zh")(np.zeros(9), 5)
    assert (timing.tokens, timing.first_tokens) == (5, 3)
    assert timing.token_s == (timing.total_s - timing.first_s) / 2


def _timed(tpot_ms: float, **facts: object) -> dict[str, Any]:
    spread = {"p50": tpot_ms}
    clip = {"tpot_ms": spread, "ttft_ms": {"p50": 100.0}, "rtf": {"p50": 0.5}}
    return {"clips": {"short": clip}, "weight_bytes": 1_000_000, "device": "cpu", **facts}


def test_a_model_that_says_nothing_has_no_ratio() -> None:
    """No second token, no time a token: the others' figures stand."""
    silent = _timed(0.0)
    peer = _timed(8.0, peer="llama.cpp", threads=1, compiled=True)
    speed.compare(silent, [_timed(9.0)], [peer])
    speed.add_limits(silent, {1 << 30: 5e9}, None)
    assert silent["times_faster_than_baseline"]["short"] == {"ttft_ms": 1.0, "rtf": 1.0}
    assert silent["times_faster_than"]["llama.cpp"]["short"] == {"rtf": 1.0}
    assert silent["bandwidth_limit"]["percent_of_limit"] == {}
    assert "best_installed_peer" not in silent, "it had to be compiled"
    quick = _timed(2.0)
    slower = _timed(6.0, peer="genai", threads=2, compiled=False)
    speed.compare(quick, [_timed(11.0), _timed(9.0)], [peer, slower])
    assert quick["times_faster_than_baseline"]["short"]["tpot_ms"] == 4.5
    assert quick["best_installed_peer"]["short"] == {"peer": "genai", "threads": 2, "tpot_ms": 3.0}


def test_a_gpu_is_compared_with_nothing_on_the_processor() -> None:
    entry = _timed(1.0, device="cuda")
    peer = _timed(6.0, peer="genai", threads=2, compiled=False)
    speed.compare(entry, [_timed(9.0)], [peer])
    speed.add_limits(entry, {1 << 30: 5e9}, None)
    assert not {"times_faster_than_baseline", "times_faster_than", "bandwidth_limit"} & set(entry)
    speed.compare(entry, [_timed(9.0, device="cuda"), _timed(1.0)], [peer])
    assert entry["times_faster_than_baseline"]["short"]["tpot_ms"] == 9.0


def test_times_are_of_their_machine_and_of_the_first_model(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "notes.txt").write_text("another model")
    config, models = LatencyConfig(lang="de"), [tiny_model, other]
    parents = {"corpus": tiny_corpus, "model 0": tiny_model, "model 1": other}
    settings = config.recorded() | environment.measured_on()
    with artefact.writing(tmp_path / "out", "results", settings, 0, parents):
        pass

    def is_made(config: LatencyConfig, models: list[Path]) -> bool:
        return steps.up_to_date(steps.latency(config, models, tiny_corpus, tmp_path / "out"))

    assert is_made(config, models)
    assert is_made(LatencyConfig(lang="de", timeout_s=7.0), models), "no time depends on it"
    assert not is_made(config, models[::-1]), "the first one is the baseline's"
    there = {"measured_on": {**environment.measured_on()["measured_on"], "cores": 99}}
    monkeypatch.setattr(environment, "measured_on", lambda: there)
    assert not is_made(config, models)


def test_a_path_without_a_model_is_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        run_latency(LatencyConfig(lang="de"), [tmp_path / "nothing"], tiny_corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_is_refused_at_once(tmp_path: Path) -> None:
    model = text_models.make_model(tmp_path / "llama", "llama")
    corpus = text_models.make_corpus(tmp_path / "corpus")
    with pytest.raises(InputError, match="llama reads text, and the latency bench times audio"):
        run_latency(LatencyConfig(lang="de"), [model], corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_clip_that_no_model_hears_to_its_end_is_refused(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FAMILIES["qwen2_audio"]), "max_audio_s", 2.0)
    config = LatencyConfig(lang="de", short_s=1.0, long_s=4.0)
    with pytest.raises(InputError, match=r"long clip is [34]\.\d s, and .*tiny hears 2 s at once"):
        run_latency(config, [tiny_model], tiny_corpus, tmp_path / "out")
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


def test_weights_of_a_release_count_once(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "release"
    shutil.copytree(tiny_model, model)
    before = size.measure(model)
    for name in ("pytorch_model.bin", "flax_model.msgpack"):
        (model / name).write_bytes(bytes(10_000_000))
    header = b'{"w": {"dtype": "F64", "shape": [1000000], "data_offsets": [0, 8000000]}}'
    wide = len(header).to_bytes(8, "little") + header + bytes(8_000_000)
    (model / "model.fp64.safetensors").write_bytes(wide)
    for name in ("original/consolidated.00.pth", ".cache/huggingface/download/x", ".git/objects/y"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_bytes(bytes(10_000_000))
    after = size.measure(model)
    assert (after.stored_bytes, after.precision) == (before.stored_bytes, before.precision)
    (found,) = find_models(ServeSettings(models=(str(model),))).values()
    (alone,) = find_models(ServeSettings(models=(str(tiny_model),))).values()
    assert found.size_bytes == alone.size_bytes


def test_a_log_of_times_is_no_part_of_the_size(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345")
    (tmp_path / "timings.jsonl").write_bytes(b"0123456789")
    assert size.stored_bytes(tmp_path) == 5
