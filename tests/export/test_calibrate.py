"""Calibration sees what layers read, in order, and GPTQ packages are nearer to their student."""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.calibrate import Calibration, read_samples
from export.config import PackageConfig
from export.package import run_package
from export.runtime import OnnxTranslator
from halve import artefact
from halve.errors import InputError
from halve.models import load_model
from halve.translate import TorchTranslator

pytestmark = pytest.mark.usefixtures("two_threads")


def package(student: Path, corpus: Path | None, out: Path, **settings) -> Path:
    config = PackageConfig.model_validate(
        {"precision": "int4", "langs": ("de",), "parity_segments": 1, "force": True, **settings}
    )
    return run_package(config, student, corpus, out).path


def test_moments_are_of_what_a_layer_reads_after_the_weights_before_it(
    student: Path, tiny_corpus: Path
) -> None:
    speech = load_model(student)
    samples = read_samples(tiny_corpus, ["de", "zh"], speech, 5)
    assert [sample.lang for sample in samples] == ["de"] * 3 + ["zh"] * 2
    family = speech.family
    keys = [f"{family.disk_layers}{number}.mlp.down_proj" for number in (0, 1)]
    plain = Calibration(load_model(student), samples)
    expected = [plain.moments(key) for key in keys]
    assert np.allclose(expected[0], expected[0].T) and np.linalg.eigvalsh(expected[0]).min() > -1e-2

    read: list[torch.Tensor] = []
    layer = speech.part(family.layers)[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: read.append(args[0].reshape(-1, 128)))
    other = Calibration(speech, samples)
    other.moments(keys[0])
    other.replace([keys[0]], np.zeros((64, 128), np.float32))
    changed = other.moments(keys[1])
    direct = torch.cat(read).double()
    assert np.allclose(changed, (direct.T @ direct).numpy(), rtol=1e-3, atol=1e-2)
    assert np.abs(changed - expected[1]).max() > 0.1 * np.abs(expected[1]).max()


def test_head_moments_are_of_the_states_that_choose_tokens(
    student: Path, tiny_corpus: Path
) -> None:
    speech = load_model(student)
    family, samples = speech.family, read_samples(tiny_corpus, ["de", "zh"], speech, 18)
    translator = TorchTranslator(speech)
    decoder, table = speech.part(family.decoder), speech.part(family.embeddings)
    chosen = []
    for sample in samples:
        prompt = translator.inputs(translator.encode_all([sample.source])[0], sample.lang)
        with torch.inference_mode():
            whole = torch.cat([prompt, table(torch.tensor(sample.tokens[:-1]))])[None]
            chosen.append(decoder(inputs_embeds=whole).last_hidden_state[0, len(prompt) - 1 :])
        assert len(chosen[-1]) == len(sample.tokens)
    states = torch.cat(chosen).double()
    found = Calibration(speech, samples).moments(family.disk_head.removesuffix("."))
    assert np.allclose(found, (states.T @ states).numpy(), rtol=1e-3, atol=1e-2)


def test_a_student_goes_when_its_calibration_is_closed(student: Path, tiny_corpus: Path) -> None:
    speech = load_model(student)
    samples = read_samples(tiny_corpus, ["de"], speech, 2)
    calibration = Calibration(speech, samples)
    calibration.moments(f"{speech.family.disk_layers}1.mlp.down_proj")
    left = weakref.ref(speech.model)
    gc.collect()
    gc.disable()  # what a collection would find is held for as long as none comes
    try:
        del speech
        calibration.close()
        assert left() is None
    finally:
        gc.enable()


def test_calibration_uses_train_alone(student: Path, tiny_corpus: Path) -> None:
    from halve.corpus import read_corpus

    samples = read_samples(tiny_corpus, ["de"], load_model(student), 99)
    corpus = read_corpus(tiny_corpus)
    train = [corpus.audio(segment) for segment in corpus.split("train")]
    assert len(samples) == len(train) == 12
    assert all(np.array_equal(a.source, b) for a, b in zip(samples, train, strict=True))
    with pytest.raises(InputError, match="calibration"):
        read_samples(tiny_corpus, ["de"], load_model(student), 0)


def test_gptq_packages_are_nearer_and_repeatable(
    student: Path, tiny_corpus: Path, tmp_path: Path, packages: dict[str, Path], clips: list
) -> None:
    names = {"gptq": {}, "search": {"encoder_bits": 4}}
    made = {
        name: package(student, tiny_corpus, tmp_path / name, quantise=name, **more)
        for name, more in names.items()
    }
    facts = json.loads((made["gptq"] / "package.json").read_text())["onnx"]
    assert facts["quantise"] == "gptq" and facts["bits"]["encoder"] == 4
    exact = OnnxTranslator(packages["fp32"])
    gaps = {}
    for name, path in made.items():
        each = OnnxTranslator(path)
        gaps[name] = np.mean([np.abs(each.encode(c) - exact.encode(c)).mean() for c in clips])
    assert gaps["gptq"] < gaps["search"]
    again = package(student, tiny_corpus, tmp_path / "again", quantise="gptq")
    assert artefact.file_sha256(again / "decoder.bin") == artefact.file_sha256(
        made["gptq"] / "decoder.bin"
    )


def test_methods_and_bits_are_on_record(student: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    path = package(student, None, tmp_path / "k", quantise="k-quant", encoder_bits=4)
    facts = json.loads((path / "package.json").read_text())["onnx"]
    assert facts["quantise"] == "k-quant"
    bits = facts["bits_per_weight"]
    # 4 bits, 16 of each scale and 4 of each zero to 32 weights; norms and biases are small.
    assert 4.62 < bits["decoder"] < 5.2 and bits["head"] == pytest.approx(4.625)
    assert bits["embeddings"] == pytest.approx(4.5)
    assert artefact.read(path).extra["bits_per_weight"] == bits
    assert "with scales" in (path / "README.md").read_text()
    with pytest.raises(InputError, match="corpus"):
        package(student, None, tmp_path / "g", quantise="gptq")
    default = package(student, None, tmp_path / "d")
    assert json.loads((default / "package.json").read_text())["onnx"]["quantise"] == "search"


def test_fp16_graphs_are_valid_and_near(
    student: Path, tiny_corpus: Path, tmp_path: Path, packages: dict[str, Path], clips: list
) -> None:
    path = package(
        student, tiny_corpus, tmp_path / "half", precision="fp16", max_drop=100.0, force=False
    )
    kinds = {each.data_type for each in onnx.load(path / "decoder.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.BFLOAT16 not in kinds
    assert (path / "decoder.bin").stat().st_size < 1.1 * (
        packages["fp32"] / "decoder.bin"
    ).stat().st_size
    half, exact = OnnxTranslator(path), OnnxTranslator(packages["fp32"])
    assert half.device == "cpu"
    assert np.abs(half.encode(clips[0]) - exact.encode(clips[0])).max() < 0.02
    limits = [6] * len(clips)
    alone = half.translate(clips, "de", limits=limits, batch_size=1)
    assert half.translate(clips, "de", limits=limits, batch_size=3) == alone
    first = [rows[0].tokens[:1] for rows in (alone, exact.translate(clips, "de", limits=limits))]
    assert first[0] == first[1]
    with pytest.raises(InputError, match="onnxruntime-gpu"):
        OnnxTranslator(path, device="cuda")
    with pytest.raises(InputError, match="fp16"):
        OnnxTranslator(packages["fp32"], device="cuda")


def test_caches_bound_by_address_compute_the_same(
    packages: dict[str, Path], clips: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.caches import DeviceCaches

    exact = OnnxTranslator(packages["fp32"], threads=1)
    limits = [9, 4, 12, 7, 5]
    expected = [
        exact.translate(clips, "de", limits=limits, batch_size=2),
        exact.translate(clips, "de", limits=limits, beams=3),
    ]
    decoder = exact._decoder
    monkeypatch.setattr(
        decoder,
        "new_caches",
        lambda slots, capacity: DeviceCaches(decoder.geometry, slots, capacity, np.float32, "cpu"),
    )
    found = [
        exact.translate(clips, "de", limits=limits, batch_size=2),
        exact.translate(clips, "de", limits=limits, beams=3),
    ]
    assert found == expected
