"""Reports: every number is there, subsets are marked, two runs are compared."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, plots, scoring, tables
from benchmarks.report import _cost_of, _costs, run_report
from halve import artefact
from halve.audio import SAMPLE_RATE_HZ, decode_audio
from halve.corpus import read_corpus
from halve.errors import ArtefactError, InputError
from halve.json_files import append_jsonl, write_json

VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Balanced(HTMLParser):
    """Fails where a tag is left open; collects text and image sources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(str(dict(attrs)["src"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _page(path: Path) -> _Balanced:
    page = _Balanced()
    page.feed((path / "report.html").read_text(encoding="utf8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a search over six layers writes, on 3 of 6 segments."""
    out = tmp_path_factory.mktemp("search") / "importance"
    scores = {0: {1: 40.0, 2: 45.5, 3: 39.0, 4: 41.0}, 1: {1: 30.0, 3: 35.25, 4: 31.0}}
    with artefact.writing(out, "importance", {"lang": "de", "segments": 3}, 0, {}) as draft:
        for number, layers in scores.items():
            for layer, value in layers.items():
                record: dict[str, Any] = {"round": number, "layer": layer, "score": value}
                record |= {"metric": "chrf++", "signature": "nrefs:1|version:2.6.0"}
                append_jsonl(draft.path / "importance.jsonl", record)
        plan: dict[str, Any] = {"family": "qwen2_audio", "num_layers": 6}
        plan |= {"removed": [2, 3], "kept": [0, 1, 4, 5]}
        plan["max_new_tokens"] = {"a": 40, "b": 41, "c": 42}
        write_json(draft.path / "plan.json", plan)
    return out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training history."""
    out = tmp_path_factory.mktemp("tune") / "adapter"
    with artefact.writing(out, "adapter", {"select_segments": 5}, 0, {}) as draft:
        for step in range(3):
            line = {"step": step, "epoch": step / 3, "loss": 3.0 - step, "score": 20.0 + step}
            append_jsonl(draft.path / "history.jsonl", line)
    return out


@pytest.fixture(scope="module")
def latency(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latency result, as the bench writes it."""
    out = tmp_path_factory.mktemp("latency") / "latency"
    clip = {"duration_s": 5.0, "tokens": 12, "text": "x"}
    clip |= {key: {"p50": 7.25, "p95": 9.5} for key in ("ttft_ms", "tpot_ms", "rtf")}
    entry: dict[str, Any] = {"path": "student", "layers": 9, "precision": "int4", "load_s": 0.25}
    entry |= {"peak_memory_bytes": 123_400_000, "clips": {"short": clip}, **clip}
    result = {
        "bench": "latency",
        "threads": 1,
        "repeats": 5,
        "warmup": 1,
        "clips": {"short": {"duration_s": 5.0}},
        "machine": {"cpu": "a processor"},
        "baseline": None,
        "models": [entry],
    }
    with artefact.writing(out, "results", {}, 0, {}) as draft:
        write_json(draft.path / "latency.json", result)
    return out


@pytest.fixture(scope="module")
def report(
    quality_result: Path,
    importance: Path,
    adapter: Path,
    latency: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("reports") / "report"
    run_report([quality_result, importance, adapter, latency], out)
    return out


def test_controls_say_what_the_teacher_was_given(quality_result: Path) -> None:
    result = json.loads((quality_result / "quality.json").read_text())
    heard = tables.controls_table(result)
    assert heard is not None
    assert heard.title == "Does the teacher listen?"
    firsts = ["the segment's own audio", "shuffled audio", "silence"]
    assert [row[0] for row in heard.rows] == firsts
    controls = result["teacher"]["controls"]
    result["teacher"]["controls"] = {"shuffled_text": controls["silence"]}
    read = tables.controls_table(result)
    assert read is not None
    assert (read.title, read.header[0]) == ("Does the teacher read?", "read")
    assert [row[0] for row in read.rows] == ["the segment's own text", "shuffled text"]
    assert read.rows[1][1:] == heard.rows[2][1:]
    assert "audio" not in read.note


def test_numbers_and_subsets_are_in_both_pages(report: Path, quality_result: Path) -> None:
    page = _page(report)
    result = json.loads((quality_result / "quality.json").read_text())
    markdown = (report / "report.md").read_text(encoding="utf8")
    kept = result["students"][0]["retention"]["chrf++"]
    wanted = [
        "4 of 6 test segments (a subset)",
        "3 select segments (a subset: the search was told to use so many)",
        "at most 5 select segments a language",
        "COMET not measured: no checkpoint was given",
        f"{result['teacher']['scores']['chrf++']['score']:.2f}",
        f"{kept['percent']:.1f} [{kept['low']:.1f}, {kept['high']:.1f}]",
        f"{result['students'][0]['stored_bytes'] / 1e6:.1f}",
        "shuffled audio",
        "45.50",
        "7.2 (9.5)",
        "123.4",
    ]
    for text in (" ".join(page.text), markdown):
        for part in wanted:
            assert part in text, part


def test_plots_are_in_the_page_itself(report: Path) -> None:
    page = _page(report)
    assert len(page.images) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.images)
    html = (report / "report.html").read_text(encoding="utf8")
    assert "http://" not in html
    assert "https://" not in html
    drawn = sorted(path.name for path in (report / "plots").iterdir())
    assert len(drawn) == 4
    assert (report / "plots" / drawn[0]).read_text().lstrip().startswith("<?xml")


def test_markdown_tables_are_whole(report: Path) -> None:
    width = 0
    for line in (report / "report.md").read_text(encoding="utf8").splitlines():
        cells = line.replace("\\|", "").count("|")
        if line.startswith("|"):
            width = width or cells
            assert cells == width, line
        else:
            width = 0


def test_a_repeated_report_is_the_same(
    report: Path,
    quality_result: Path,
    importance: Path,
    adapter: Path,
    latency: Path,
    tmp_path: Path,
) -> None:
    again = tmp_path / "again"
    run_report([quality_result, importance, adapter, latency], again)
    assert artefact.read(again).files == artefact.read(report).files


def test_worst_regressions_come_first(quality_result: Path) -> None:
    rows = tables.regressions(scoring.read_result(quality_result), "student")
    differences = [row["difference"] for row in rows]
    assert len(rows) == 4
    assert differences == sorted(differences)
    assert rows[0]["difference"] == pytest.approx(
        rows[0]["student_score"] - rows[0]["teacher_score"], abs=0.011
    )


def test_hostile_text_is_escaped(quality_result: Path, tmp_path: Path) -> None:
    copy = _other_run(quality_result, tmp_path / "odd", ["<script>alert(1)</script> | a"] * 4)
    run_report([copy], tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf8")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


class _Sounds(HTMLParser):
    """Collects what audio elements play."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "audio":
            self.sources.append(dict(attrs)["src"] or "")


def test_the_page_plays_the_segments(
    quality_result: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    run_report([quality_result], tmp_path / "report", corpus=tiny_corpus)
    page = _Sounds()
    page.feed((tmp_path / "report" / "report.html").read_text(encoding="utf8"))
    files = scoring.read_result(quality_result)
    assert len(page.sources) == len(files.ids) * len(files.result["students"])
    corpus = read_corpus(tiny_corpus)
    lengths = {round(segment.duration_s, 2) for segment in corpus.segments}
    for source in page.sources:
        data = base64.b64decode(source.partition("base64,")[2])
        samples = decode_audio(io.BytesIO(data))
        assert round(len(samples) / SAMPLE_RATE_HZ, 2) in lengths


def test_latency_is_drawn_against_quality(
    quality_result: Path, latency: Path, tmp_path: Path
) -> None:
    timed = tmp_path / "latency"
    result = json.loads((latency / "latency.json").read_text())
    scored = json.loads((quality_result / "quality.json").read_text())
    names = [model["name"] for model in [scored["teacher"], *scored["students"]]]
    entry = result["models"][0]
    result["models"] = [entry | {"path": f"runs/{name}"} for name in names]
    with artefact.writing(timed, "results", {}, 0, {}) as draft:
        write_json(draft.path / "latency.json", result)
    run_report([quality_result, timed], tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf8")
    assert "Time per output token against chrF++" in markdown
    # Latency is of greedy translations: what five beams are worth has another price.
    searched = shutil.copytree(quality_result, tmp_path / "searched")
    write_json(searched / "quality.json", scored | {"beams": 5})
    run_report([searched, timed], tmp_path / "other")
    assert "Time per output token against" not in (tmp_path / "other" / "report.md").read_text()


def test_times_of_one_run_are_not_drawn_against_another_s_quality(
    quality_result: Path, latency: Path, tmp_path: Path
) -> None:
    result = json.loads((latency / "latency.json").read_text())
    scored = json.loads((quality_result / "quality.json").read_text())
    names = [model["name"] for model in [scored["teacher"], *scored["students"]]]
    result["models"] = [result["models"][0] | {"path": f"runs/{name}"} for name in names]
    for run in "ab":
        shutil.copytree(quality_result, tmp_path / run / "results" / "quality")
        with artefact.writing(
            tmp_path / run / "results" / "latency", "results", {}, 0, {}
        ) as draft:
            write_json(draft.path / "latency.json", result)
    run_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf8")
    drawn = [line for line in markdown.splitlines() if "Latency and quality" in line]
    assert len(drawn) == 2, "each run's own"


def test_scores_of_segments_are_compared_where_the_same_model_gave_them(
    quality_result: Path, tmp_path: Path
) -> None:
    compared = []
    for name, signature in (("one", "x"), ("two", "x"), ("three", "y")):
        place = shutil.copytree(quality_result, tmp_path / name)
        result = json.loads((place / "quality.json").read_text())
        models = [result["teacher"], *result["students"]]
        for number, model in enumerate(models):
            model["scores"]["comet"] = {"score": 0.5, "signature": signature}
            lines = [str(0.5 + 0.01 * number * len(name))] * result["segments"]
            scoring.write_lines(place / "comet" / f"{model['name']}.txt", lines)
        write_json(place / "quality.json", result)
        compared.append(scoring.read_result(place))
    same = compare.compare(compared[0], compared[1])["models"]
    assert [pair["metrics"]["comet"]["difference"] for pair in same] == [0.0, 0.0]
    other = compare.compare(compared[0], compared[2])["models"]
    assert "comet" not in other[0]["metrics"]


def _other_run(quality_result: Path, out: Path, hypotheses: list[str]) -> Path:
    """The same result with other hypotheses of the student."""
    with artefact.writing(out, "results", {}, 0, {}) as draft:
        shutil.copytree(quality_result, draft.path, dirs_exist_ok=True)
        (draft.path / "artefact.json").unlink()
        scoring.write_lines(draft.path / "hypotheses" / "student.txt", hypotheses)
    return out


def test_two_runs_are_compared(quality_result: Path, report: Path, tmp_path: Path) -> None:
    references = scoring.read_lines(quality_result / "references.txt")
    better = _other_run(quality_result, tmp_path / "better", references)
    # An earlier report stands for the run it was made of.
    run_report([report, better], tmp_path / "report")
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    (found,) = record["comparisons"]
    teacher, student = found["models"]
    assert teacher["texts_changed"] == 0
    assert not any(metric["significant"] for metric in teacher["metrics"].values())
    assert student["texts_changed"] == 4
    chrf = student["metrics"]["chrf"]
    assert chrf["p_value"] < 0.05
    # Four segments can be swapped in 16 ways: the second test cannot call that significant.
    assert chrf["p_randomised"] > 0.05
    assert not chrf["significant"]
    assert student["metrics"]["chrf"]["difference"] > 50
    assert "significant at 5 %" in (tmp_path / "report" / "report.md").read_text()


def test_other_languages_are_not_compared(quality_result: Path) -> None:
    first = scoring.read_result(quality_result)
    second = scoring.ResultFiles(
        first.path, {**first.result, "lang": "zh"}, first.ids, first.sources, first.references
    )
    found = compare.compare(first, second)
    assert found["models"] == []
    assert "languages differ" in found["note"]


def test_nothing_to_report_is_one_clear_error(tmp_path: Path, tiny_corpus: Path) -> None:
    with pytest.raises(InputError, match="No results"):
        run_report([], tmp_path / "report")
    with pytest.raises(ArtefactError, match="holds no results"):
        run_report([tmp_path], tmp_path / "report")
    with pytest.raises(ArtefactError, match="is of kind corpus"):
        run_report([tiny_corpus], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_pareto_front() -> None:
    points = [(10.0, 50.0), (5.0, 40.0), (6.0, 39.0), (5.0, 41.0), (5.0, 41.0)]
    assert plots.pareto_front(points) == {0, 3, 4}


@pytest.mark.parametrize(
    ("used", "total", "text"),
    [
        (40, 120, "40 of 120 select segments (a subset)"),
        (120, 120, "all 120 select segments"),
        (7, None, "7 select segments"),
    ],
)
def test_subsets_are_said(used: int, total: int | None, text: str) -> None:
    assert tables.segments_text(used, total, "select") == text


def test_merges_stand_beside_packages_of_their_run(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def scored(value: float) -> dict[str, Any]:
        return {"de": {"metric": "chrf++", "score": value, "signature": "s"}}

    rows = [
        {"form": "adapter on", "onto": "dequantized", "precision": "nf4", "scores": scored(27.5)},
        {"form": "merged", "onto": "base", "precision": "bfloat16", "scores": scored(28.25)},
    ]
    with artefact.writing(run / "student", "student", {}, 0, {}) as draft:
        (draft.path / "model.safetensors").write_bytes(b"weights")
        draft.extra |= {
            "onto": "base",
            "merge": {"split": "select", "segments": 120, "rows": rows},
        }
    with artefact.writing(run / "plain", "student", {}, 0, {}) as draft:
        (draft.path / "model.safetensors").write_bytes(b"others")
    of_package = {"metric": "chrf++", "equal": 20, "segments": 30, "package_score": 26.75}
    of_package |= {"difference": -1.5, "difference_low": -2.0, "difference_high": -1.0}
    facts = {"target": "onnx", "precision": "int4", "parity": {"languages": {"de": of_package}}}
    with artefact.writing(run / "packages" / "onnx-int4", "package", {}, 0, {}) as draft:
        write_json(draft.path / "package.json", facts)
    report = run_report([run], tmp_path / "report").path
    page = (report / "report.md").read_text(encoding="utf8")
    assert "| adapter on | dequantized | nf4 | chrF++ 27.50 | 120 |" in page
    assert "| onnx package | base | int4 | chrF++ 26.75 | 30 |" in page
    assert "plain" not in page
    assert not list(report.rglob("*.safetensors"))


def test_models_of_one_name_keep_their_own_times() -> None:
    timed = [
        {"path": path, "tpot_ms": {"p50": cost}}
        for path, cost in (("runs/a/student", 1.0), ("runs/b/student", 2.0), ("teacher", 3.0))
    ]
    costs = _costs(timed, True)
    one_of_each = {"student": 1, "teacher": 1}
    found = [
        _cost_of({"path": path}, costs, one_of_each)
        for path in ("runs/a/student", "runs/b/student", "runs/c/student", "elsewhere/teacher")
    ]
    assert found == [1.0, 2.0, None, 3.0]
    two = {"teacher": 2}
    assert _cost_of({"path": "elsewhere/teacher"}, costs, two) is None, (
        "which of the two was timed?"
    )
    assert _cost_of({"path": "teacher"}, costs, two) == 3.0
    apart = _costs([{"path": "runs/a/teacher", "tpot_ms": {"p50": 3.0}}], False)
    assert _cost_of({"path": "elsewhere/teacher"}, apart, one_of_each) is None
