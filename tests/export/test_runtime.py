"""Packages translate as their student does: batched, alone, streamed, and without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.runtime import OnnxTranslator, open_translator
from halve.errors import ArtefactError, InputError
from halve.languages import language
from halve.models import load_model
from halve.translate import TorchTranslator

ROOT = Path(__file__).parents[2]
# One of a single token: a limit is reached whatever a processor makes of a random model.
LIMITS = [40, 25, 30, 1, 40]


@pytest.fixture(scope="module")
def expected(student: Path, clips: list) -> list:
    return TorchTranslator(load_model(student)).translate(clips, "de", limits=LIMITS)


def test_fp32_tokens_are_torch_s_batched_and_alone(
    packages: dict[str, Path], clips: list, expected: list
) -> None:
    translator = open_translator(packages["fp32"], threads=1)
    for batch_size in (1, 2, 16):
        assert translator.translate(clips, "de", limits=LIMITS, batch_size=batch_size) == expected
    assert {row.stopped for row in expected} == {"end", "limit"}, "both ways to stop are tested"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(
    packages: dict[str, Path], clips: list, precision: str
) -> None:
    translator = open_translator(packages[precision], threads=1)
    alone = translator.translate(clips, "zh", limits=LIMITS, batch_size=1)
    assert translator.translate(clips, "zh", limits=LIMITS, batch_size=5) == alone
    order = [3, 0, 4, 2, 1]
    mixed = translator.translate(
        [clips[i] for i in order], "zh", limits=[LIMITS[i] for i in order], batch_size=2
    )
    assert mixed == [alone[i] for i in order]


def test_int8_stays_near_float32(packages: dict[str, Path], clips: list) -> None:
    exact, eight, four = (open_translator(packages[p]) for p in ("fp32", "int8", "int4"))
    assert np.abs(exact.encode(clips[0]) - eight.encode(clips[0])).max() < 0.1
    starts = {
        name: [row.tokens for row in each.translate(clips, "de", limits=[1] * 5)]
        for name, each in (("exact", exact), ("eight", eight), ("four", four))
    }
    assert sum(a == b for a, b in zip(starts["exact"], starts["eight"], strict=True)) >= 4


def test_stream_joins_to_the_translation(
    packages: dict[str, Path], clips: list, expected: list
) -> None:
    translator = open_translator(packages["fp32"])
    for clip, limit, row in zip(clips, LIMITS, expected, strict=True):
        pieces, whole = _drained(translator.stream(clip, "de", limit=limit))
        assert "".join(pieces) == row.text
        assert whole == row


def _drained(stream) -> tuple[list, object]:
    """What a generator yields, and what it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_rows_join_and_leave_between_steps(
    packages: dict[str, Path], clips: list, expected: list
) -> None:
    translator = open_translator(packages["fp32"])
    batch = translator.open_batch(2, capacity=64)  # smaller than the rows: it must grow
    first = batch.add(translator.inputs(clips[0], "de"), LIMITS[0])
    batch.step()
    second = batch.add(translator.inputs(clips[1], "de"), LIMITS[1])
    with pytest.raises(InputError, match="slots"):
        batch.add(translator.inputs(clips[2], "de"), 5)
    batch.step()
    batch.remove(first)  # cancelled
    third = batch.add(translator.inputs(clips[2], "de"), LIMITS[2])
    while batch.rows:
        batch.step()
    assert [second.tokens, third.tokens] == [expected[1].tokens, expected[2].tokens]
    assert first.tokens == expected[0].tokens[: len(first.tokens)] and not first.stopped


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_clips_encoded_ahead_are_translated_the_same(
    packages: dict[str, Path], clips: list, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = open_translator(packages[name], threads=2)
    many, limits = clips * 3, list(LIMITS) * 3
    ahead = translator.translate(many, "de", limits=limits, batch_size=2)
    with pytest.raises(InputError, match="no samples"):
        translator.translate([*clips, clips[0][:0]], "de")
    with pytest.raises(InputError, match="does not translate into"):
        translator.translate(clips, "fr")
    monkeypatch.setattr(translator, "_encoders", lambda audio: 1)
    assert translator.translate(many, "de", limits=limits, batch_size=2) == ahead


def test_onnxruntime_reports_nothing(packages: dict[str, Path], tmp_path: Path) -> None:
    # It keeps an identifier in the temporary directory as soon as it is imported ready to report.
    code = (
        "import sys; from pathlib import Path; from export.runtime import open_translator; "
        "open_translator(Path(sys.argv[1])).close(); print('opened')"
    )
    variables = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CI", "ORT_DISABLE_TELEMETRY", "GITHUB_ACTIONS")
    }
    found = subprocess.run(
        [sys.executable, "-c", code, packages["int4"]],
        env=variables | {"TMPDIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "opened\n"
    assert list(tmp_path.iterdir()) == []


def test_cancelling_ends_a_batch(packages: dict[str, Path], clips: list) -> None:
    translator = open_translator(packages["int4"])
    asked = iter(range(100))
    found = dict(
        translator.translate_each(
            clips, "de", limits=[3] * 5, batch_size=1, cancelled=lambda: next(asked) > 6
        )
    )
    assert 0 < len(found) < len(clips)


def test_loops_are_cut_on_request(packages: dict[str, Path], clips: list) -> None:
    cutting = OnnxTranslator(packages["fp32"], stop_loops=True)
    cutting._decoder.take = _always(cutting._decoder, 7)
    row = cutting.translate(clips[:1], "de", limits=[400])[0]
    assert row.stopped == "loop" and set(row.tokens) == {7} and len(row.tokens) < 60


@pytest.mark.parametrize("asked", [False, True])
def test_any_runtime_cuts_loops_when_it_is_asked_to(
    packages: dict[str, Path],
    student: Path,
    clips: list,
    monkeypatch: pytest.MonkeyPatch,
    asked: bool,
) -> None:
    for module in ("halve.translate", "export.rows"):
        monkeypatch.setattr(f"{module}.is_looping", lambda tokens: True)
    for path in (student, packages["fp32"]):
        translator = open_translator(path, stop_loops=asked)
        found = translator.translate(clips[:1], "de", limits=[4])[0]
        translator.close()
        assert (found.stopped == "loop") is asked


def test_streams_record_loops(packages: dict[str, Path], clips: list) -> None:
    cutting = OnnxTranslator(packages["fp32"], stop_loops=True)
    cutting._decoder.take = _always(cutting._decoder, 7)
    _, whole = _drained(cutting.stream(clips[0], "de", limit=400))
    assert whole.stopped == "loop"


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_stock_generate_s(
    packages: dict[str, Path], student: Path, clips: list, beams: int
) -> None:
    torch_translator = TorchTranslator(load_model(student))
    stock = [
        _stock_beams(torch_translator, clip, limit, beams)
        for clip, limit in zip(clips, LIMITS, strict=True)
    ]
    onnx = open_translator(packages["fp32"], threads=1)
    for translator in (torch_translator, onnx):
        rows = translator.translate(clips, "de", limits=LIMITS, beams=beams)
        assert [(row.tokens, row.stopped) for row in rows] == stock
    greedy = onnx.translate(clips, "de", limits=LIMITS)
    assert [row.tokens for row in greedy] != [tokens for tokens, _ in stock]
    assert {stopped for _, stopped in stock} == {"end", "limit"}, "both ways to stop are tested"


def _stock_beams(translator: TorchTranslator, clip, limit: int, beams: int) -> tuple[list, str]:
    """Stock generate on the stock processor's inputs, padded to 30 s as it does."""
    speech = translator.speech
    instruction = speech.family.instruction(language("de"))
    inputs = speech.processor(
        text=speech.family.prompt_text(speech.processor, instruction),
        audio=clip,
        sampling_rate=16_000,
        return_tensors="pt",
        audio_kwargs={"padding": "max_length"},
    )
    whole = speech.model.generate(
        **inputs,
        num_beams=beams,
        max_new_tokens=limit,
        length_penalty=1.0,
        early_stopping=False,
        do_sample=False,
    )
    tokens = whole[0, inputs["input_ids"].shape[1] :].tolist()
    ends = speech.family.end_ids(speech.model)
    ended = [place for place, token in enumerate(tokens) if token in ends]
    return (tokens[: ended[0]], "end") if ended else (tokens, "limit")


def _always(decoder, token: int):
    take = type(decoder).take
    return lambda row, _: take(decoder, row, token)


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "transformers", "onnx", "peft"):
    sys.modules[name] = None  # importing it raises
import numpy as np
from export.runtime import open_translator
clip = np.load(sys.argv[2])
row = open_translator(sys.argv[1], threads=1).translate([clip], "de", limits=[25])[0]
print(json.dumps([row.text, row.tokens]))
"""


def test_runs_where_torch_cannot_be_imported(
    packages: dict[str, Path], clips: list, expected: list, tmp_path: Path
) -> None:
    np.save(tmp_path / "clip.npy", clips[1])
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        str(packages["fp32"]),
        str(tmp_path / "clip.npy"),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected[1].text, expected[1].tokens]


def test_any_model_opens(
    packages: dict[str, Path], student: Path, clips: list, expected: list
) -> None:
    assert isinstance(open_translator(packages["int4"]), OnnxTranslator)
    assert open_translator(student).translate(clips, "de", limits=LIMITS) == expected


def test_short_and_long_clips(packages: dict[str, Path]) -> None:
    translator = open_translator(packages["int4"])
    assert len(translator.encode(np.zeros(10, np.float32))) == 1
    assert len(translator.encode(np.zeros(16_000 * 40, np.float32))) == 750
    with pytest.raises(InputError, match="no samples"):
        translator.encode(np.zeros(0, np.float32))


def test_refuses_other_languages_devices_and_overlong_rows(
    packages: dict[str, Path], clips: list
) -> None:
    translator = open_translator(packages["int4"])
    with pytest.raises(InputError, match="does not translate into French"):
        translator.translate(clips[:1], "fr")
    with pytest.raises(InputError, match="positions"):
        translator.translate(clips[:1], "de", limits=[5000])
    with pytest.raises(InputError, match="cuda"):
        open_translator(packages["int4"], device="cuda")


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "encoder.bin", "tokenizer.json", "embeddings.npy"]
)
def test_damaged_packages_are_named(packages: dict[str, Path], tmp_path: Path, name: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(packages["int8"], copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:100])
    with pytest.raises(ArtefactError, match="cannot be opened"):
        OnnxTranslator(copy)
    (copy / "package.json").write_text("[]")
    with pytest.raises(ArtefactError, match="not an object"):
        open_translator(copy)
    (copy / "package.json").write_text('{"schema_version": 99}')
    with pytest.raises(ArtefactError, match="schema version"):
        open_translator(copy)
