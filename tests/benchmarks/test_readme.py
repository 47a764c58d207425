"""README shows the newest committed results, and nothing else."""

from pathlib import Path

import pytest

from benchmarks import readme
from halve.errors import ArtefactError
from halve.json_files import read_json, write_json

README = readme.ROOT / "README.md"


def test_readmes_tables_are_those_of_the_newest_results() -> None:
    text = README.read_text(encoding="utf8")
    assert readme.filled(text) == text, "run python -m benchmarks.readme --write"


def test_a_newer_result_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = readme.newest("students", "students.json")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(ArtefactError, match="No result students"):
        readme.students_table()
    for date, score in (("2026-01-01", 11.11), ("2026-01-02", 22.22)):
        result["students"][0]["langs"]["de"]["scores"]["chrf++"] = score
        folder = tmp_path / f"{date}-students"
        folder.mkdir()
        write_json(folder / "students.json", result)
    assert read_json(folder / "students.json") == result
    assert "22.22" in readme.students_table() and "11.11" not in readme.students_table()


def test_a_result_without_readmes_students_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = readme.newest("students", "students.json")
    lacking = [one for one in result["students"] if one["name"] not in ("C-0", "D-0")]
    folder = tmp_path / "2026-01-01-students"
    folder.mkdir()
    write_json(folder / "students.json", result | {"students": lacking})
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(ArtefactError, match="C-0, D-0 not in the students' result"):
        readme.students_table()
    assert readme.main([]) != 0
    assert "No result demo-quality-de" in capsys.readouterr().err


def test_a_readme_without_the_table_is_named() -> None:
    with pytest.raises(ArtefactError, match="no place for the table demo"):
        readme.filled("# halve\n")


def test_saying_less_is_no_speed() -> None:
    timed = {"rtf": {"p50": 0.1}, "duration_s": 5.0, "tpot_ms": {"p50": 10.0}, "tokens": 20}
    assert readme.slowed(timed, 20) == 1
    assert readme.slowed(timed, 30) == pytest.approx(0.5 / 0.6)
    assert readme.slowed(timed, 10) == pytest.approx(0.5 / 0.4)
