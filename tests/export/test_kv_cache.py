"""Keys and values in 8 bits: what is kept stands for what was computed, whoever else is in the batch."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.cache_scales import HEADROOM, CacheScales, Peaks
from export.calibrate import Calibration, read_samples
from export.config import PackageConfig, check_possible
from export.geometry import Geometry, rotary_table
from export.package import run_package
from export.runtime import OnnxTranslator, open_translator
from halve.errors import ArtefactError, InputError
from halve.families import SourceText
from halve.models import load_model
from tests import tiny
from tests.export.test_text_packages import PLAIN
from tests.families import text_models

HEADS, KV_HEADS, DIM = 4, 2, 16


def geometry() -> Geometry:
    frequencies = tuple(0.7**k for k in range(DIM // 2))
    return Geometry(1, 64, HEADS, KV_HEADS, DIM, 512, 1e-6, 99, frequencies)


def turned(states: np.ndarray) -> np.ndarray:
    """Rotary embeddings of states (heads, positions, dim)."""
    cosines, sines = rotary_table(geometry(), states.shape[1])
    first, second = np.split(states, 2, axis=-1)
    return np.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )


def test_factors_leave_scores_and_even_channels_out() -> None:
    """One channel a hundred times as large as the others: with one scale the others would be lost."""
    generator = np.random.default_rng(0)
    queries = generator.standard_normal((HEADS, 7, DIM)).astype(np.float32)
    keys = generator.standard_normal((KV_HEADS, 7, DIM)).astype(np.float32)
    keys[1, :, 3] *= 100
    kept = turned(keys)
    peaks = Peaks.of(kept, np.full((KV_HEADS, 7, DIM), -3.0, np.float32))
    scales = CacheScales.of_layer(peaks, geometry())
    of_queries, of_keys, of_values = np.split(
        scales.qkv_factors, np.cumsum([HEADS * DIM, KV_HEADS * DIM])
    )
    assert np.array_equal(of_values, np.ones(KV_HEADS * DIM))
    assert scales.value == pytest.approx(HEADROOM * 3 / 127)
    other_queries = turned(queries * of_queries.reshape(HEADS, 1, DIM))
    other_keys = turned(keys * of_keys.reshape(KV_HEADS, 1, DIM))

    def scores(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return some @ others.repeat(HEADS // KV_HEADS, axis=0).transpose(0, 2, 1)

    expected = scores(turned(queries), kept)
    assert np.allclose(scores(other_queries, other_keys), expected, rtol=1e-4, atol=1e-4)
    codes = other_keys / scales.key
    assert 127 / HEADROOM / 2**0.5 < np.abs(codes).max() < 127 / HEADROOM * 1.001
    gap = np.abs(scores(other_queries, codes.round() * scales.key) - expected).mean()
    one_scale = np.abs(kept).max() / 127
    naive = np.abs(scores(turned(queries), (kept / one_scale).round() * one_scale) - expected)
    assert gap < naive.mean() / 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its keys have a channel far larger than the others, as real models' do."""
    folder = tmp_path_factory.mktemp("kv")
    path = tiny.make_model(folder / "model", hidden_size=256, num_hidden_layers=2)
    speech = load_model(path)
    with torch.no_grad():
        for layer in speech.part(speech.family.layers):
            layer.self_attn.k_proj.bias[5] = 100.0
    speech.model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[32, 128])
def packages(
    request: pytest.FixtureRequest,
    model: Path,
    tiny_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The same weights without and with keys and values in 8 bits; channels not evened out; peaks a quarter of the true ones."""
    folder = tmp_path_factory.mktemp("packages")
    made = {}
    other_scales = {"uneven": uneven, "narrow": narrow}
    for name, kv_bits in (("whole", None), ("eight", 8), ("uneven", 8), ("narrow", 8)):
        config = PackageConfig(
            precision="int4",
            langs=("de",),
            quantise="search",
            block_size=request.param,
            kv_bits=kv_bits,
            force=True,
        )
        with pytest.MonkeyPatch.context() as patch:
            if name in other_scales:
                patch.setattr(CacheScales, "of_layer", other_scales[name])
            made[name] = run_package(config, model, tiny_corpus, folder / name).path
    return made


of_layer = CacheScales.of_layer


def narrow(peaks: Peaks, geometry: Geometry) -> CacheScales:
    return of_layer(Peaks(peaks.keys / 4, peaks.values / 4), geometry)


def uneven(peaks: Peaks, geometry: Geometry) -> CacheScales:
    ones = np.ones(peaks.values.size * (2 + geometry.heads // geometry.kv_heads), np.float32)
    return CacheScales(float(peaks.keys.max()) / 127, float(peaks.values.max()) / 127, ones)


def test_logits_hardly_change(packages: dict[str, Path]) -> None:
    clip = tiny.tone(2.0, 1)
    found = {}
    for name, path in packages.items():
        with_cache = OnnxTranslator(path, threads=1)
        inputs = with_cache.inputs(clip, "de")
        batch = with_cache.open_batch(1)
        row = batch.add(inputs, 30)
        steps = enumerate((7, 8, 9))
        found[name] = np.array(
            [batch._run([token], [row.length + step]).copy() for step, token in steps]
        )
        stored = {array.dtype for array in batch._caches._arrays}
        assert stored == {np.dtype(np.float32 if name == "whole" else np.int8)}
    gaps = {name: np.abs(logits - found["whole"]).mean() for name, logits in found.items()}
    assert 0 < gaps["eight"] < 0.1 * found["whole"].std()
    assert gaps["eight"] < 0.7 * gaps["uneven"]
    facts = json.loads((packages["eight"] / "package.json").read_text())
    assert facts["onnx"]["bits"]["cache"] == 8
    assert "Keys and values are kept in 8 bits" in (packages["eight"] / "README.md").read_text()


@pytest.mark.parametrize("positions", [40, 129])
def test_a_row_has_the_same_bits_alone_and_among_others(
    packages: dict[str, Path], positions: int
) -> None:
    prompt = np.random.default_rng(0).standard_normal((positions, 256)).astype(np.float32)
    found = []
    for threads, rows in ((1, 1), (2, 1), (1, 3), (2, 3)):
        translator = open_translator(packages["eight"], threads=threads)
        batch = translator.open_batch(rows)
        for more in range(rows - 1):
            batch.add(prompt[: 20 + more], 50)
        first = batch.logits_after(prompt).copy()
        row = batch.add(prompt, 50)
        while not row.stopped:
            batch.step()
        found.append((first, row.tokens))
    assert len(found[0][1]) > 1
    for first, tokens in found[1:]:
        assert np.array_equal(first, found[0][0])
        assert tokens == found[0][1]


def test_what_is_beyond_a_peak_is_cut_and_keeps_its_sign(packages: dict[str, Path]) -> None:
    prompt = np.random.default_rng(0).standard_normal((30, 256)).astype(np.float32)
    kept = {}
    for name in ("whole", "narrow"):
        batch = OnnxTranslator(packages[name], threads=1).open_batch(1)
        batch.logits_after(prompt)
        kept[name] = [array[0, :, :30].astype(np.float32) for array in batch._caches._arrays[:2]]
    for whole, narrow in zip(kept["whole"], kept["narrow"], strict=True):
        largest = np.abs(narrow) >= 127
        assert 0.01 < largest.mean() < 0.9
        assert np.array_equal(np.sign(whole[largest]), np.sign(narrow[largest]))


def test_peaks_are_those_of_pairs_wherever_they_turn(model: Path, tiny_corpus: Path) -> None:
    """A pair that hardly turns within a short clip turns onto one of its channels later."""
    slow = np.zeros((1, 3, DIM), np.float32)
    slow[0, :, [7, 15]] = 3.0
    assert Peaks.of(slow, slow).keys[0, 7] == pytest.approx(3 * 2**0.5)
    speech = load_model(model)
    calibration = Calibration(speech, read_samples(tiny_corpus, ["de"], speech, 5))
    found = calibration.cache_peaks()
    decoder = speech.part(speech.family.decoder)
    for layer, peaks in enumerate(found):
        expected = []
        for inputs, _ in calibration._inputs:
            with torch.inference_mode():
                cache = decoder(inputs_embeds=inputs[None], use_cache=True).past_key_values
            stored = cache.layers[layer]
            expected.append(Peaks.of(stored.keys[0].numpy(), stored.values[0].numpy()))
        assert np.allclose(peaks.keys, np.max([each.keys for each in expected], axis=0))
        assert np.allclose(peaks.values, np.max([each.values for each in expected], axis=0))
    # The channel whose bias is 100, and the other one of its pair, in whichever head it is.
    assert found[0].keys.max() > 90


@pytest.mark.parametrize("trim", [False, True])
def test_calibrated_weights_too(model: Path, tiny_corpus: Path, tmp_path: Path, trim: bool) -> None:
    """GPTQ goes on after the peaks were taken, and makes the codes that it makes without them."""
    made = []
    for kv_bits in (None, 8):
        config = PackageConfig(
            precision="int4",
            langs=("de",),
            kv_bits=kv_bits,
            trim_vocab=trim,
            force=True,
            parity_segments=1,
        )
        made.append(run_package(config, model, tiny_corpus, tmp_path / str(kv_bits)).path)
    codes = []
    for path in made:
        graph = onnx.load(path / "decoder.onnx").graph
        assert json.loads((path / "package.json").read_text())["onnx"]["quantise"] == "gptq"
        codes.append({t.name: t.raw_data for t in graph.initializer if t.name.endswith("_codes")})
    assert codes[0] == codes[1]
    assert open_translator(made[1]).translate([tiny.tone(1.0, 1)], "de", limits=[5])[0].tokens


def test_a_decoder_that_reads(tmp_path: Path) -> None:
    """No biases, and a tokenizer instead of an encoder."""
    decoder = text_models.make_model(tmp_path / "llama", "llama", **PLAIN)
    corpus = text_models.make_corpus(tmp_path / "corpus")
    said = []
    for kv_bits in (None, 8):
        config = PackageConfig(
            precision="int8", langs=("de",), kv_bits=kv_bits, force=True, parity_segments=1
        )
        path = run_package(config, decoder, corpus, tmp_path / str(kv_bits)).path
        translator = open_translator(path, threads=1)
        batch = translator.open_batch(1)
        inputs = translator.inputs(SourceText("Open the file.", "en"), "de")
        said.append(batch.logits_after(inputs).copy())
    assert 0 < np.abs(said[0] - said[1]).mean() < 0.1 * said[0].std()


def test_an_older_onnxruntime_is_named(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.2")
    with pytest.raises(ArtefactError, match=r"which onnxruntime 1\.31\.2 cannot"):
        open_translator(packages["eight"])
    open_translator(packages["whole"])


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="A cache in 8 bits needs a corpus"):
        run_package(
            PackageConfig(precision="int4", langs=("de",), kv_bits=8), model, None, tmp_path / "p"
        )
    for target, precision in (("onnx", "fp32"), ("gguf", "int4"), ("checkpoint", "nf4")):
        with pytest.raises(InputError, match="cannot keep keys and values in 8 bits"):
            check_possible(PackageConfig(target=target, precision=precision, kv_bits=8))
