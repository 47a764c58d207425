"""Packages hold what they say, and only faithful ones are published."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from export import package, parity
from export.config import PackageConfig, check_possible
from export.package import run_package
from export.parity import check_parity, top_two_gap
from export.runtime import open_translator
from export.scoring import open_select_sets
from export.vocabulary import encoded, kept_tokens, unseen_share
from halve import artefact
from halve.errors import FamilyError, InputError, ParityError
from halve.models import load_model
from halve.progress import SILENT
from halve.shards import tensor_shapes
from halve.translate import TorchTranslator
from tests import tiny
from tests.importing import Heard


def parity_of(path: Path) -> dict:
    return json.loads((path / "package.json").read_text())["parity"]


def test_fp32_package_says_its_student_s_tokens(packages: dict[str, Path]) -> None:
    parity = parity_of(packages["fp32"])
    assert parity["passed"]
    assert set(parity["languages"]) == {"de", "zh"}
    for found in parity["languages"].values():
        assert found["equal"] + len(found["near_ties"]) == found["segments"] == 6
        assert found["difference"] == 0 or found["near_ties"]


def test_packages_shrink_with_their_precision(packages: dict[str, Path]) -> None:
    sizes = [(packages[p] / "decoder.bin").stat().st_size for p in ("fp32", "int8", "int4")]
    # bfloat16 values, then 8.5 and 4.5 bits with their scales.
    assert sizes[1] < 0.58 * sizes[0] and sizes[2] < 0.33 * sizes[0]
    for path in packages.values():
        assert artefact.verify(path) == []
        assert artefact.read(path, "package").extra["parity_passed"] is True


def test_a_flipped_byte_is_named(packages: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(packages["int4"], copy)
    data = bytearray((copy / "decoder.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "decoder.bin").write_bytes(data)
    assert [fault.split(":")[0] for fault in artefact.verify(copy)] == ["decoder.bin"]


def test_packaging_again_gives_the_same_bytes(
    packages: dict[str, Path], student: Path, tmp_path: Path, tiny_corpus: Path
) -> None:
    config = PackageConfig(target="onnx", precision="int4", max_drop=100.0)
    again = run_package(config, student, tiny_corpus, tmp_path / "onnx-int4").path
    assert artefact.identity(again) == artefact.identity(packages["int4"])


def test_nf4_checkpoint_reloads_and_translates(
    student: Path, tiny_corpus: Path, tmp_path: Path, clips: list
) -> None:
    config = PackageConfig(target="checkpoint", precision="nf4", max_drop=100.0)
    path = run_package(config, student, tiny_corpus, tmp_path / "nf4").path
    stored = json.loads((path / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_quant_type"] == "nf4" and stored["bnb_4bit_use_double_quant"]
    kinds = {key: kind for key, (_, kind) in tensor_shapes(path).items()}
    assert kinds["language_model.model.layers.0.mlp.up_proj.weight"] == "U8"
    assert kinds["language_model.lm_head.weight"] == kinds["audio_tower.conv1.weight"] == "BF16"
    translator = open_translator(path, dtype="bfloat16")
    rows = translator.translate(clips, "de", limits=[8] * len(clips))
    # The same weights, quantised on loading instead of in the file.
    loaded = TorchTranslator(load_model(student, dtype="bfloat16", quantization="nf4"))
    expected = loaded.translate(clips, "de", limits=[8] * len(clips))
    assert [row.tokens for row in rows] == [row.tokens for row in expected]
    assert translator.languages == ("de", "zh")


def test_bf16_checkpoint_holds_the_student_s_weights(
    student: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = PackageConfig(target="checkpoint", precision="bf16", langs=("de",), max_drop=100.0)
    path = run_package(config, student, tiny_corpus, tmp_path / "bf16").path
    hashes = [artefact.file_sha256(each / "model.safetensors") for each in (student, path)]
    assert hashes[0] == hashes[1]


def test_a_drop_beyond_the_limit_is_refused_or_marked(
    student: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No quantised package gains 200 points: every one fails.
    config = PackageConfig(precision="int4", langs=("de",), parity_segments=2)
    config = config.model_copy(update={"max_drop": -200.0})  # which the command line refuses
    with pytest.raises(ParityError, match=r"de: chrf\+\+ .* a drop of .* interval"):
        run_package(config, student, tiny_corpus, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    forced = config.model_copy(update={"force": True})
    # What was refused is not made again.
    monkeypatch.setattr(package, "TARGETS", {})
    path = run_package(forced, student, tiny_corpus, tmp_path / "p").path
    assert list(tmp_path.iterdir()) == [path] and artefact.verify(path) == []
    assert parity_of(path)["forced"] and not parity_of(path)["passed"]
    assert "kept by force" in (path / "README.md").read_text()


def test_another_model_s_tokens_are_no_parity(
    student: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    other = partial(open_translator, tiny.make_model(tmp_path / "other", seed=9))
    sets = open_select_sets(tiny_corpus, ["de"], 3)
    config = PackageConfig(target="onnx", precision="fp32")
    with pytest.raises(ParityError, match="3 of 3 segments have other tokens"):
        check_parity(config, student, other, sets, SILENT)


def test_a_gpu_need_not_hold_package_and_student_at_once(
    student: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Told(TorchTranslator):
        def close(self) -> None:
            events.append("closed")
            super().close()

    def loaded(path: Path, **options: Any) -> Any:
        events.append("loaded")
        return load_model(path, **options)

    monkeypatch.setattr(parity, "load_model", loaded)
    sets = open_select_sets(tiny_corpus, ["de", "zh"], 2)
    config = PackageConfig(target="checkpoint", precision="bf16")
    found = check_parity(config, student, lambda: Told(load_model(student)), sets, SILENT)
    assert events == ["closed", "loaded"]
    assert found["languages"].keys() == {"de", "zh"} and found["passed"]


def test_gap_between_the_two_best_tokens(student: Path, clips: list) -> None:
    translator = TorchTranslator(load_model(student))
    tokens = translator.translate(clips[:1], "de", limits=[3])[0].tokens
    assert top_two_gap(translator, clips[0], "de", tokens[:2]) > 1e-4


def test_without_a_corpus_a_package_is_marked_unchecked(student: Path, tmp_path: Path) -> None:
    config = PackageConfig(precision="int8", langs=("de",))
    path = run_package(config, student, None, tmp_path / "p").path
    assert parity_of(path)["passed"] is None
    assert "no corpus" in (path / "README.md").read_text()
    with pytest.raises(InputError, match="No language"):
        run_package(PackageConfig(), student, None, tmp_path / "q")


@pytest.mark.parametrize(
    ("target", "precision", "error"),
    [
        ("gguf", "nf4", InputError),
        ("onnx", "nf4", InputError),
        ("checkpoint", "int4", InputError),
    ],
)
def test_refuses_what_it_cannot_make(
    student: Path, tmp_path: Path, target: str, precision: str, error: type[Exception]
) -> None:
    config = PackageConfig(target=target, precision=precision, langs=("de",))
    with pytest.raises(error):
        run_package(config, student, None, tmp_path / "p")


@pytest.mark.parametrize(
    ("target", "precision"), [("checkpoint", "nf4"), ("onnx", "fp32"), ("gguf", "fp16")]
)
@pytest.mark.parametrize(
    "given",
    [
        {"head_bits": 8},
        {"embedding_bits": 4, "quantise": "rtn"},
        {"encoder_bits": 8},
        {"block_size": 32},
    ],
)
def test_refuses_ways_to_round_what_is_not_rounded_so(
    student: Path, tmp_path: Path, target: str, precision: str, given: dict[str, Any]
) -> None:
    config = PackageConfig(target=target, precision=precision, langs=("de",), **given)
    said = f"{' and '.join(given)} cannot be chosen for target {target} in {precision}"
    with pytest.raises(InputError, match=said):
        run_package(config, student, None, tmp_path / "p")
    check_possible(PackageConfig(target=target, precision=precision))


def test_refuses_4_bit_rounding_where_nothing_has_4_bits() -> None:
    with pytest.raises(InputError, match="8 are rounded to nearest, not by gptq"):
        check_possible(PackageConfig(target="onnx", precision="int8", quantise="gptq"))
    check_possible(PackageConfig(target="onnx", precision="int8", quantise="rtn"))
    check_possible(PackageConfig(target="onnx", precision="int8", quantise="gptq", head_bits=4))


def test_refuses_a_decoder_of_another_layout(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "m", hidden_act="gelu")
    with pytest.raises(FamilyError, match="activation"):
        run_package(PackageConfig(langs=("de",)), model, None, tmp_path / "p")


def test_a_trimmed_vocabulary_says_the_same(
    student: Path, tiny_corpus: Path, tmp_path: Path, clips: list
) -> None:
    config = PackageConfig(precision="fp32", langs=("de",), trim_vocab=True, force=True)
    path = run_package(config, student, tiny_corpus, tmp_path / "p").path
    facts = json.loads((path / "package.json").read_text())
    kept = set(np.load(path / "vocabulary.npy").tolist())
    assert facts["onnx"]["decoder"]["vocabulary"] == len(kept) < 512
    assert f"trimmed to {len(kept)} of 512 tokens" in (path / "README.md").read_text()
    assert facts["logical_parameters"] == 483_200 - 2 * 64 * (512 - len(kept))
    trimmed, whole = open_translator(path), TorchTranslator(load_model(student))
    said = whole.translate(clips, "de", limits=[4] * len(clips))
    for clip, row in zip(clips, said, strict=True):
        first_dropped = next(
            (i for i, t in enumerate(row.tokens) if t not in kept), len(row.tokens)
        )
        found = trimmed.translate([clip], "de", limits=[4])[0]
        assert found.tokens[:first_dropped] == row.tokens[:first_dropped]
        assert set(found.tokens) <= kept
    tokenizer = whole.speech.processor.tokenizer
    for text in ("Zeilenumbruch — ß, 漢字 🙂", "Tabelle öffnen"):
        spelled = tokenizer.backend_tokenizer
        assert trimmed.text(spelled.encode(text).ids) == text


def test_a_trimmed_vocabulary_keeps_further_texts_and_says_what_it_lacks(
    student: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.de.txt"
    more.write_text("Zeilenumbruch und Tabellenblatt\n\n", encoding="utf8")
    config = PackageConfig(precision="fp32", langs=("de",), trim_vocab=True, force=True)
    kept, told = [], Heard()
    for number, texts in enumerate(([], [more])):
        path = run_package(
            config, student, tiny_corpus, tmp_path / str(number), told, texts=texts
        ).path
        kept.append(set(np.load(path / "vocabulary.npy").tolist()))
    tokenizer = tiny.make_tokenizer().backend_tokenizer
    wanted = set(tokenizer.encode("Zeilenumbruch und Tabellenblatt", add_special_tokens=False).ids)
    assert kept[1] == kept[0] | wanted > kept[0]
    warned = [text for text in told.warnings if "are expected not to be among them" in text]
    assert len(warned) == 2 and f"trimmed to {len(kept[0])} of 512 tokens" in warned[0]
    with pytest.raises(InputError, match="not trimmed"):
        run_package(
            PackageConfig(langs=("de",)), student, tiny_corpus, tmp_path / "p", texts=[more]
        )
    for content in (b"\n", b"\xff\xfe"):
        more.write_bytes(content)
        with pytest.raises(InputError, match=r"more\.de\.txt"):
            run_package(config, student, tiny_corpus, tmp_path / "p", texts=[more])
    with pytest.raises(InputError, match="nowhere"):
        run_package(config, student, tiny_corpus, tmp_path / "p", texts=[tmp_path / "nowhere"])


def test_unseen_tokens_are_estimated_by_those_of_one_text_alone() -> None:
    tokenizer = tiny.make_tokenizer().backend_tokenizer
    texts = ["Datei öffnen", "Datei schließen", "Zeilenumbruch Zeilenumbruch"]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    alone = [id_ for of in ids for id_ in of if sum(id_ in other for other in ids) == 1]
    assert 0 < len(alone) < sum(map(len, ids)) and len(set(alone)) < len(alone)
    share = len(alone) / sum(map(len, ids))
    assert unseen_share(encoded(tokenizer, texts)) == share
    assert unseen_share(encoded(tokenizer, texts * 2)) == share
    assert unseen_share([]) == 1


def test_kept_tokens_can_spell_anything() -> None:
    tokenizer = tiny.make_tokenizer().backend_tokenizer
    kept = kept_tokens(tokenizer, encoded(tokenizer, ["Datei öffnen"]), [1, 2], 512)
    names = {tokenizer.id_to_token(int(id_)) for id_ in kept}
    assert set(ByteLevel.alphabet()) <= names
    assert {*tokenizer.encode("Datei öffnen").ids, 1, 2} <= set(kept.tolist())
