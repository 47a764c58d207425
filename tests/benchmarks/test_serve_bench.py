"""The serving bench: real servers of small models, and what it says when there is none."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import batching
from benchmarks.config import ServeBenchConfig
from benchmarks.serve import run_serve_bench
from benchmarks.ties import differs_at_tie, shared_tokens
from export.runtime import open_translator
from halve.audio import read_audio
from halve.corpus import read_corpus
from halve.errors import HalveError, InputError


def test_every_key_and_equal_texts(
    tiny_model: Path, tiny_student: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = ServeBenchConfig(lang="de", clients=2, requests=4, warmup=1, segments=4, threads=1)
    run_serve_bench(config, tiny_student, tiny_model, tiny_corpus, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "serve.json").read_text())
    for side in (result, result["baseline"], result["one_at_a_time"]):
        for regime in ("clients_1", "clients_2"):
            assert 0 < side[regime]["p50_ms"] <= side[regime]["p95_ms"]
            assert side[regime]["throughput_rps"] > 0
            assert side[regime]["tokens_per_s"] > 0
            assert side[regime]["requests"] == 4
        assert (side["errors"], side["wrong_texts"], side["tie_texts"]) == (0, 0, 0)
        assert side["compared_texts"] == 8
    engines = [result[key]["engine"] for key in ("one_at_a_time", "baseline")]
    assert [result["engine"], *engines] == ["auto", "auto", "plain"]
    assert result["decode_tokens_per_s"] is None
    one = result["baseline"]["clients_1"]["p50_ms"] / result["clients_1"]["p50_ms"]
    assert result["times_faster"]["p50_at_1_client"] == pytest.approx(one, abs=0.01)


class _Steps:
    """A runtime whose steps take as long for a full batch as for one row."""

    clock_s = 0.0
    manifest = SimpleNamespace(decoder=SimpleNamespace(max_positions=100))

    def inputs(self, clip: np.ndarray, lang: str) -> np.ndarray:
        return clip

    def open_batch(self, slots: int) -> "_Steps":
        self.slots, self.rows = slots, []
        return self

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    def add(self, inputs: np.ndarray, limit: int) -> None:
        self.rows.append(limit)

    def step(self) -> None:
        self.clock_s += 0.002
        self.rows = [left - 7 for left in self.rows if left > 7]


def test_decoding_rates_count_full_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "TOKENS", 40)
    steps = _Steps()
    clock = SimpleNamespace(perf_counter=lambda: steps.clock_s)
    monkeypatch.setattr(batching, "time", clock)
    rates = batching.decode_rates(steps, [np.zeros(3)], "de", 8)
    assert rates is not None
    assert rates["batch_1"] == pytest.approx(1 / 0.002)
    assert rates["times"] == pytest.approx(8)


def test_a_server_that_does_not_start_is_one_clear_error(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = ServeBenchConfig(lang="de", startup_s=20)
    command = (sys.executable, "-c", "raise SystemExit('no such engine')")
    with pytest.raises(HalveError, match="no such engine"):
        run_serve_bench(config, tiny_model, None, tiny_corpus, tmp_path / "out", command=command)
    assert not (tmp_path / "out").exists()


def test_a_package_is_no_baseline_and_no_server_starts(tiny_corpus: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name in ("package.json", "decoder.onnx", "tokenizer.json"):
        (package / name).write_text("{}")
    started = tmp_path / "started"
    command = (sys.executable, "-c", f"open({str(started)!r}, 'w')")
    with pytest.raises(InputError, match=r"package cannot be the baseline.*name --teacher"):
        run_serve_bench(
            ServeBenchConfig(lang="de"),
            package,
            None,
            tiny_corpus,
            tmp_path / "out",
            command=command,
        )
    assert not started.exists()


def test_shared_tokens() -> None:
    prefixes = ["", "Die", "Die D", "Die Datei", "Die Datei öffnen"]
    assert shared_tokens(prefixes, "Die Datei schließen") == 3
    assert shared_tokens(prefixes, "Das Bild") == 0
    assert shared_tokens(["", "ö�", "öff"], "öff") == 2


def test_a_near_tie_is_judged_by_the_gap(tiny_model: Path, tiny_corpus: Path) -> None:
    translator = open_translator(tiny_model, threads=1)
    corpus = read_corpus(tiny_corpus)
    segment = corpus.split("test", "de")[0]
    audio = read_audio(corpus.path / segment.audio)
    tokens = translator.translate([audio], "de")[0].tokens
    given = (translator, audio, "de", tokens, "something else")
    assert differs_at_tie(*given, most=1e6)
    assert not differs_at_tie(*given, most=1e-9)
    translator.close()
