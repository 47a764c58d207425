"""The quality bench on small real models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recheck, scoring, tables
from benchmarks.compare import compare
from benchmarks.conditions import conditions_table
from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from export.config import PackageConfig
from export.package import run_package
from export.runtime import open_translator
from halve import artefact, environment, metrics
from halve.corpus import read_corpus
from halve.errors import CorpusError, InputError
from halve.json_files import read_jsonl, write_json
from halve.metrics import METRICS, score
from halve.sources import segment_limit
from pipeline import summary
from tests.importing import Heard


def _result(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / "quality.json").read_text())
    return value


def _opened(
    monkeypatch: pytest.MonkeyPatch, meet: Callable[[list[str]], None] = lambda names: None
) -> list[str]:
    """The names of the models that are opened from here on; `meet` is asked at each and may raise."""
    names: list[str] = []

    def noted(path: Any, **options: Any) -> Any:
        names.append(Path(path).name)
        meet(names)
        return open_translator(path, **options)

    monkeypatch.setattr("benchmarks.translations.open_translator", noted)
    return names


def test_the_object_has_every_key(quality_result: Path, tiny_model: Path) -> None:
    result = _result(quality_result)
    assert (result["lang"], result["split"], result["segments"]) == ("de", "test", 4)
    assert result["segments_in_split"] == 6
    assert result["subset"] is True
    teacher, (student,) = result["teacher"], result["students"]
    for model, layers in ((teacher, 6), (student, 4)):
        assert model["decoder_layers"] == layers
        assert model["precision"] == "fp32"
        assert model["target"] == "checkpoint"
        assert model["stored_bytes"] > 4 * model["logical_parameters"]
        assert set(model["scores"]) == set(METRICS)
        assert all("version:" in entry["signature"] for entry in model["scores"].values())
        assert set(model["behaviour"]) == {
            "length_ratio_over_2",
            "empty",
            "cut_at_limit",
            "loops",
            "repeats",
        }
    assert teacher["path"] == str(tiny_model)
    for metric in METRICS:
        kept = student["retention"][metric]
        if teacher["scores"][metric]["score"] == 0:
            assert kept["percent"] is kept["low"] is kept["high"] is None
        else:
            assert kept["low"] <= kept["high"]
    assert set(teacher["controls"]) == {"shuffled_audio", "silence"}
    for scores in teacher["controls"].values():
        assert set(scores) == set(METRICS)
    assert result["comet"]["text"].startswith("COMET not measured: no checkpoint")


def test_the_result_holds_no_times(quality_result: Path) -> None:
    text = (quality_result / "quality.json").read_text()
    assert "second" not in text
    assert not artefact.verify(quality_result)
    events = [row["event"] for row in read_jsonl(quality_result / "timings.jsonl")]
    assert {"translate tiny", "translate tiny.silence", "translate student"} <= set(events)


def test_recomputed_scores_are_equal(quality_result: Path) -> None:
    assert scoring.recompute_faults(quality_result) == []
    again = scoring.recompute(quality_result)
    assert set(again) == {"tiny", "student", "tiny.shuffled_audio", "tiny.silence"}
    files = scoring.read_result(quality_result)
    direct = score("bleu", files.hypotheses("student"), files.references, "de")
    assert again["student"]["bleu"]["score"] == pytest.approx(direct.score, abs=1e-6)


def test_a_wrong_interval_is_named(quality_result: Path, tmp_path: Path) -> None:
    assert recheck.faults(quality_result, intervals=True) == []
    copy = shutil.copytree(quality_result, tmp_path / "copy")
    result = _result(copy)
    result["students"][0]["retention"]["chrf++"]["difference"] += 1.0
    write_json(copy / "quality.json", result)
    assert recheck.faults(copy) == []
    (fault,) = recheck.faults(copy, intervals=True)
    assert fault.startswith("student chrf++, difference: ")


def test_what_was_translated_elsewhere_says_so(
    quality_result: Path, tiny_model: Path, tiny_student: Path, tiny_corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = shutil.copytree(quality_result, tmp_path / "out")
    config = QualityConfig(lang="de", limit=4, resamples=200, batch_size=2, threads=1)
    monkeypatch.setattr(environment, "instructions", lambda: ("avx2", "amx_bf16"))
    progress = Heard()
    run_quality(config, tiny_model, [tiny_student], tiny_corpus, out, progress)
    assert any("here avx2 amx_bf16" in text for text in progress.warnings)
    taken = artefact.read(out).extra["taken_over"]
    assert taken.keys() == {"tiny", "student"}
    assert "amx_bf16" not in taken["tiny"]["instructions"]


def test_a_run_that_goes_on_elsewhere_says_so(
    tiny_model: Path, tiny_student: Path, tiny_corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def failing(names: list[str]) -> None:
        if names == ["tiny", "student"]:
            raise KeyboardInterrupt

    _opened(monkeypatch, failing)
    config = QualityConfig(lang="de", limit=2, resamples=100, controls=False, threads=1)
    given = (config, tiny_model, [tiny_student], tiny_corpus, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_quality(*given)
    here = list(environment.instructions())
    monkeypatch.setattr(environment, "instructions", lambda: ("sve",))
    progress = Heard()
    run_quality(*given, progress)
    assert "begun with other versions or on another processor" in progress.warnings[0]
    (first,) = artefact.read(tmp_path / "out").extra["begun_on"]
    assert first["instructions"] == here


def test_a_record_without_roles_is_read(
    quality_result: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    old = shutil.copytree(quality_result, tmp_path / "old")
    record = json.loads((old / "artefact.json").read_text())
    record["parents"] = {name.split(" ")[-1]: hashed for name, hashed in record["parents"].items()}
    write_json(old / "artefact.json", record)
    opened = _opened(monkeypatch)
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)
    run_quality(config, tiny_model, [], tiny_corpus, tmp_path / "out", earlier=[old])
    assert opened == []


def test_every_model_searches_with_the_beams_that_are_asked_for(
    tiny_model: Path, tiny_student: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = QualityConfig(lang="de", limit=2, resamples=100, beams=3, controls=False, threads=1)
    out = tmp_path / "quality"
    run_quality(config, tiny_model, [tiny_student], tiny_corpus, out)
    assert _result(out)["beams"] == 3
    files = scoring.read_result(out)
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("test", "de", 2)
    clips = [corpus.audio(segment) for segment in segments]
    limits = [segment_limit("audio", segment) for segment in segments]
    for path, name in ((tiny_model, "tiny"), (tiny_student, "student")):
        translator = open_translator(path)
        searched = translator.translate(clips, "de", limits=limits, beams=3)
        greedy = translator.translate(clips, "de", limits=limits)
        assert files.hypotheses(name) == [scoring.one_line(each.text) for each in searched]
        assert searched != greedy


def test_an_edited_hypothesis_is_found(quality_result: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quality_result, copy)
    references = scoring.read_lines(copy / "references.txt")
    scoring.write_lines(copy / "hypotheses" / "student.txt", references)
    faults = scoring.recompute_faults(copy)
    assert any(fault.startswith("student bleu") for fault in faults)


def test_a_killed_run_goes_on_and_ends_the_same(
    quality_result: Path,
    tiny_model: Path,
    tiny_student: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(names: list[str]) -> None:
        if len(names) == 2:
            raise KeyboardInterrupt

    opened = _opened(monkeypatch, interrupted)
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)
    out = tmp_path / "quality"
    inputs = (config, tiny_model, [tiny_student], tiny_corpus, out)
    with pytest.raises(KeyboardInterrupt):
        run_quality(*inputs)
    assert not out.exists()
    run_quality(*inputs)
    assert opened == ["tiny", "student", "student"]
    for name in artefact.read(out).files:
        assert (out / name).read_bytes() == (quality_result / name).read_bytes(), name


def test_what_an_earlier_result_has_translated_is_not_translated_again(
    quality_result: Path,
    tiny_model: Path,
    tiny_student: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = _opened(monkeypatch)
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)
    joined = shutil.copytree(tiny_student, tmp_path / "joined")
    (joined / "README.md").write_text("another student\n")
    students = [joined, tiny_student]
    out = tmp_path / "out"
    run_quality(config, tiny_model, students, tiny_corpus, out, earlier=[quality_result])
    assert opened == ["joined"]
    taken = artefact.read(out).extra["taken_over"]
    assert taken.keys() == {"tiny", "student"}
    assert taken["tiny"]["result"] == artefact.identity(quality_result)
    assert taken["tiny"]["torch"] == artefact.read(quality_result).versions["torch"]
    before, after = scoring.read_result(quality_result), scoring.read_result(out)
    for name in ("tiny", "tiny.silence", "student"):
        assert after.hypotheses(name) == before.hypotheses(name)
    assert after.hypotheses("joined") == before.hypotheses("student")
    old, new = _result(quality_result), _result(out)
    assert new["teacher"] == old["teacher"]
    assert new["students"][1] == old["students"][0]


def test_what_is_there_outlives_a_change_of_students(
    quality_result: Path,
    tiny_model: Path,
    tiny_student: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(names: list[str]) -> None:
        if names[-1] == "other":
            raise RuntimeError("out of memory")

    opened = _opened(monkeypatch, failing)
    other = shutil.copytree(tiny_student, tmp_path / "other")
    (other / "README.md").write_text("another student\n")
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        run_quality(config, tiny_model, [other, tiny_student], tiny_corpus, out)
    run_quality(config, tiny_model, [tiny_student], tiny_corpus, out)
    assert opened == ["tiny", "other", "student"]
    assert _result(out) == _result(quality_result)
    opened.clear()
    # Nor does a finished result lose what another student leaves as it was.
    run_quality(config, tiny_model, [tiny_student, tiny_model], tiny_corpus, out)
    assert opened == []
    assert "taken_over" not in artefact.read(out).extra
    (out / "hypotheses" / "student.txt").write_text("Was anderes.\n" * 4)
    config = config.model_copy(update={"resamples": 200})
    run_quality(config, tiny_model, [tiny_student], tiny_corpus, out)
    assert opened == ["tiny", "student"], "a damaged result is not taken for the models' own"
    assert scoring.read_result(out).hypotheses("student") != ["Was anderes."] * 4


def test_what_another_result_said_stays_on_record(
    quality_result: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)
    out = tmp_path / "out"
    run_quality(config, tiny_model, [], tiny_corpus, out, earlier=[quality_result])
    first = artefact.read(out).extra["taken_over"]
    again = config.model_copy(update={"resamples": 200, "controls": False})
    run_quality(again, tiny_model, [], tiny_corpus, out)
    assert artefact.read(out).extra["taken_over"] == first


def test_what_a_model_cannot_translate_is_refused_before_any_has_translated(
    tiny_model: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = PackageConfig(target="onnx", precision="fp32", langs=("de",), max_drop=100.0)
    packaged = run_package(made, tiny_model, None, tmp_path / "package").path
    monkeypatch.setattr("benchmarks.translations.open_translator", None)
    config = QualityConfig(lang="zh", limit=2, resamples=100)
    with pytest.raises(InputError, match="does not translate into Chinese"):
        run_quality(config, tiny_model, [packaged], tiny_corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_terminal_says_all_that_was_measured(quality_result: Path) -> None:
    result = _result(quality_result)
    for model in (result["teacher"], *result["students"]):
        model["scores"]["comet"] = {"score": 0.71234, "signature": "-"}
    shown = summary._quality(result)
    assert "4 of 6 test segments (a subset), de" in shown
    assert "COMET" in shown and shown.count("0.7123") == 2
    result["comet"] = {"measured": False, "text": "COMET not measured: its worker died"}
    assert summary._quality(result).endswith("its worker died")


def test_results_of_two_corpora_are_told_apart(
    quality_result: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    (corpus / "artefact.json").unlink()
    config = QualityConfig(
        lang="de", limit=4, resamples=100, batch_size=1, threads=1, controls=False
    )
    run_quality(config, tiny_model, [], corpus, tmp_path / "out")
    both = [scoring.read_result(path) for path in (quality_result, tmp_path / "out")]
    changed = compare(*both, resamples=100)["changed"]
    assert changed.keys() == {"corpus", "batch_size"}
    assert changed["batch_size"] == [2, 1]


def test_a_p_value_of_nothing_is_below_what_so_few_resamples_can_tell() -> None:
    tested = {"p_value": 0.0, "p_randomised": 1 / 101}
    assert tables._p_values(tested, 100) == "<0.02, 0.010"
    assert tables._p_values(tested, 1000).startswith("<0.002")


def test_a_model_that_reads_leaves_the_others_their_noise(quality_result: Path) -> None:
    result = _result(quality_result)
    scores = {name: entry["score"] for name, entry in result["teacher"]["scores"].items()}
    result["students"][0]["noisy"] = {"snr_db": 10.0, "scores": scores}
    table = conditions_table(result)
    assert table is not None and table.header[-1] == "pink noise, 10 dB"
    assert [row[-1] for row in table.rows] == ["-", f"{scores['chrf++']:.2f}"]


def test_an_earlier_result_that_says_something_else_is_refused(
    quality_result: Path,
    tiny_model: Path,
    tiny_student: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    config = QualityConfig(lang="de", limit=4, resamples=100, batch_size=2, threads=1)

    def refusal(config: QualityConfig, teacher: Path, corpus: Path, earlier: Path) -> str:
        with pytest.raises(InputError) as refused:
            run_quality(config, teacher, [], corpus, tmp_path / "out", earlier=[earlier])
        assert not (tmp_path / "out").exists()
        return str(refused.value)

    wider = config.model_copy(update={"beams": 3, "batch_size": 1})
    assert "with batch_size 2, which is 1 here, with beams 1, which is 3 here" in refusal(
        wider, tiny_model, tiny_corpus, quality_result
    )
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    (corpus / "artefact.json").unlink()
    assert "of another corpus" in refusal(config, tiny_model, corpus, quality_result)
    other = shutil.copytree(tiny_student, tmp_path / "other")
    (other / "README.md").write_text("another model\n")
    assert "of student, tiny, none of them" in refusal(config, other, tiny_corpus, quality_result)
    edited = shutil.copytree(quality_result, tmp_path / "edited")
    (edited / "hypotheses" / "tiny.txt").write_text("Was anderes.\n" * 4)
    assert "hypotheses/tiny.txt" in refusal(config, tiny_model, tiny_corpus, edited)


def test_a_model_against_itself_keeps_everything(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = QualityConfig(lang="zh", resamples=100, controls=False, threads=1)
    run_quality(config, tiny_model, [tiny_model], tiny_corpus, tmp_path / "out")
    result = _result(tmp_path / "out")
    assert result["subset"] is False
    assert [model["name"] for model in result["students"]] == ["tiny-2"]
    assert "tok:zh" in result["teacher"]["scores"]["bleu"]["signature"]
    for kept in result["students"][0]["retention"].values():
        assert (kept["percent"], kept["low"], kept["high"]) == (100.0, 100.0, 100.0)
    assert result["teacher"]["controls"] == {}


def test_a_missing_language_is_one_clear_error(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match="no test segment with a fr reference"):
        run_quality(QualityConfig(lang="fr"), tiny_model, [], tiny_corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_behaviour_counts_shares() -> None:
    found = scoring.behaviour(["", "abcdefg", "ab"], ["abc", "abc", "ab"], {"1": "loop"})
    shares = {"length_ratio_over_2": 1 / 3, "empty": 1 / 3, "cut_at_limit": 1 / 3, "loops": 1 / 3}
    assert found == pytest.approx({**shares, "repeats": 0}, abs=1e-6)


def test_repetitions_are_found_anywhere() -> None:
    said = [
        "das mehrerererer Ende",
        "und so und so und so und so und so, fertig",
        "no, no, no, no, he said",
        "12 000 000 000 Leute",
        "的确的确的确的确很好",
        "so weiter und so fort, und so weiter",
    ]
    given = ["", "", said[2], "", "", ""]
    found = [scoring.behaviour([h], [r], {})["repeats"] for h, r in zip(said, given, strict=True)]
    assert found == [1, 1, 0, 0, 1, 0]


def test_lines_survive_odd_characters(tmp_path: Path) -> None:
    lines = ["a b\x0bc\u2028d", "", "ü 打开"]
    scoring.write_lines(tmp_path / "lines.txt", lines)
    assert scoring.read_lines(tmp_path / "lines.txt") == ["a b c d", "", "ü 打开"]


REFERENCES_DE = ["Das ist ein Haus.", "Der Hund schläft heute.", "Wir gehen nach Hause."]
HYPOTHESES_DE = ["Das ist ein Haus.", "Der Hund schläft.", "Wir gehen heim."]


def test_of_a_teacher_that_scores_nothing_no_share_is_kept() -> None:
    nothing = ["" for _ in REFERENCES_DE]
    for student in (nothing, HYPOTHESES_DE):
        kept = metrics.retention("chrf", nothing, student, REFERENCES_DE, "de", resamples=100)
        assert (kept.percent, kept.low, kept.high) == (None, None, None)
        assert kept.difference == kept.difference_high == 0 or kept.difference > 0


def test_samples_in_which_the_teacher_scores_nothing_are_left_out() -> None:
    teacher = [REFERENCES_DE[0], *("" for _ in REFERENCES_DE[1:])]
    kept = metrics.retention("chrf", teacher, teacher, REFERENCES_DE, "de", resamples=100)
    assert (kept.percent, kept.low, kept.high) == (100, 100, 100)
