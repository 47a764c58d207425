"""Whole recordings' translations: cut to fit the references, nothing lost, scored like any other."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.config import LongformConfig
from benchmarks.longform import resegment, run_longform
from benchmarks.report import run_report
from halve import artefact
from halve.errors import InputError, MissingExtraError
from halve.metrics import score
from pipeline import steps
from pipeline.cli import main

REFERENCES = [
    "Öffnen Sie die Datei, die Sie drucken möchten.",
    "Wählen Sie danach im Menü den Drucker aus.",
    "Schließen Sie zuletzt das Fenster.",
]
WORDS = st.sampled_from(["ein", "Haus", "##", "#", "<s>", "▁x", '"', "\\", "打开", "möchten,"])


def test_a_perfect_text_is_cut_where_the_references_end() -> None:
    assert resegment("\n".join(REFERENCES), REFERENCES, "de") == REFERENCES
    assert resegment(" ".join(REFERENCES), REFERENCES, "de") == REFERENCES
    chinese = ["打开文件。", "打印 PDF 页面。", "关闭窗口。"]
    assert resegment("".join(chinese), chinese, "zh") == chinese


def test_a_faulty_text_is_cut_near_its_words() -> None:
    said = (
        "Öffnen Sie die Datei. Die Sie ausdrucken möchten. wählen Sie danach im Menü einen "
        "schönen Drucker. Schliessen Sie zuletzt das Fenster."
    )
    found = resegment(said, REFERENCES, "de")
    assert found[2] == "Schliessen Sie zuletzt das Fenster."
    assert found[1].startswith("wählen Sie danach")


@settings(max_examples=15, deadline=None)
@given(st.lists(WORDS, max_size=12), st.lists(st.lists(WORDS, min_size=1), min_size=1, max_size=4))
def test_no_word_is_lost(said: list[str], references: list[list[str]]) -> None:
    lines = [" ".join(words) for words in references]
    found = resegment(" ".join(said), lines, "de")
    assert len(found) == len(lines)
    assert " ".join(piece for piece in found if piece) == " ".join(said)


def test_the_command_scores_each_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "refs.txt").write_text("\n".join(REFERENCES) + "\n", encoding="utf8")
    (tmp_path / "good.txt").write_text(" ".join(REFERENCES), encoding="utf8")
    worse = " ".join(REFERENCES).replace("Drucker", "Haus").replace("zuletzt", "")
    (tmp_path / "worse.txt").write_text(worse, encoding="utf8")
    out = tmp_path / "out"
    arguments = [
        "halve",
        "bench",
        "longform",
        "--lang",
        "de",
        "--references",
        str(tmp_path / "refs.txt"),
    ]
    texts = [str(tmp_path / "good.txt"), str(tmp_path / "worse.txt")]
    arguments += ["--hypothesis", *texts, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "good's chrF++" in capsys.readouterr().out
    result = json.loads((out / "longform.json").read_text())
    assert not artefact.verify(out)
    first, second = result["systems"]
    assert first["scores"]["chrf++"]["score"] == 100
    lines = (out / "hypotheses" / "worse.txt").read_text(encoding="utf8").splitlines()
    again = score("bleu", lines, REFERENCES, "de")
    assert second["scores"]["bleu"] == {
        "score": pytest.approx(again.score, abs=1e-5),
        "signature": again.signature,
    }
    assert second["retention"]["chrf++"]["percent"] < 100
    config = LongformConfig(lang="de")
    good, worse_one = (Path(each) for each in texts)
    for order, is_made in (((good, worse_one), True), ((worse_one, good), False)):
        step = steps.longform(config, order, tmp_path / "refs.txt", out)
        assert steps.up_to_date(step) is is_made, "all are measured against the first"
    report = run_report([out], tmp_path / "report").path
    page = (report / "report.md").read_text(encoding="utf8")
    assert "| worse |" in page and "mweralign" in page


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_bad_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    references, text = tmp_path / "refs.txt", tmp_path / "text.txt"
    references.write_text("Eins.\nZwei.\n", encoding="utf8")
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(InputError, match=r"text\.txt"):
        run_longform(LongformConfig(lang="de"), [text], references, tmp_path / "out")
    text.write_text("Eins. Zwei.", encoding="utf8")
    references.write_text("Eins.\n\nZwei.\n", encoding="utf8")
    with pytest.raises(InputError, match="line 2"):
        run_longform(LongformConfig(lang="de"), [text], references, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_aligner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"halve\[longform\]"):
        resegment("Eins.", ["Eins."], "de")
