"""More text for the teacher's warm-up: what is taken, what is not, and that nothing held out slips in."""

import json
import struct
from pathlib import Path

import pytest

from demo import measure_recorded, more_text
from demo.triples import Triple

CHARSET = "Content-Type: text/plain; charset=UTF-8\n"


def write_mo(path: Path, catalogue: dict[str, str]) -> None:
    """A GNU message catalogue, as gettext's manual lays it out."""
    entries = sorted((k.encode(), v.encode()) for k, v in {"": CHARSET, **catalogue}.items())
    header, tables = 7 * 4, 2 * 8 * len(entries)
    texts, places = b"", []
    for column in (0, 1):
        for entry in entries:
            places.append((len(entry[column]), header + tables + len(texts)))
            texts += entry[column] + b"\0"
    numbers = [0x950412DE, 0, len(entries), header, header + 8 * len(entries), 0, 0]
    flat = [number for place in places for number in place]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f"<{len(numbers) + len(flat)}I", *numbers, *flat) + texts)


def test_strings_of_the_interface_lose_their_mnemonics(tmp_path: Path) -> None:
    catalogues = {
        "de": {"menu\x04_Insert Table": "Tabelle _einfügen", "tip\x04See http://x.org": "Siehe"},
        "zh_CN": {"menu\x04_Insert Table": "插入表格(_I)"},
    }
    for lang, catalogue in catalogues.items():
        write_mo(tmp_path / lang / "LC_MESSAGES" / "sw.mo", catalogue)
    found = list(more_text.interface_pairs(tmp_path))
    assert found == [Triple("ui/sw/menu", "ui/sw", "Insert Table", "Tabelle einfügen", "插入表格")]


@pytest.mark.parametrize(
    ("row", "langs"),
    [
        ({"en": "Cell (A1): merge it", "de": "Zelle (A1): verbinden", "zh": "合并单元格"}, "de zh"),
        ({"en": "Not translated", "de": "Not translated", "zh": "未翻译"}, "zh"),
        ({"en": "Only German here", "de": "Nur Deutsch hier"}, "de"),
        ({"en": "Call print(x[0])", "de": "Rufen Sie print(x[0]) auf"}, ""),
        ({"en": "See www.example", "de": "Siehe www.example"}, ""),
        ({"en": "Far too short a translation for this", "de": "Nein"}, ""),
    ],
)
def test_only_plain_pairs_of_like_length_are_learnt_from(row: dict[str, str], langs: str) -> None:
    found = more_text.pairs("id", "page", row)
    assert (found is None) == (not langs)
    assert [lang for lang in ("de", "zh") if found and getattr(found, lang)] == langs.split()


def test_one_entry_a_text_and_none_that_is_known() -> None:
    found = more_text.merged(
        [
            Triple("1", "a", "Insert row", "Zeile einfügen", ""),
            Triple("2", "b", "insert row.", "Andere Zeile", "插入行"),
            Triple("3", "b", "Known text", "Bekannt", ""),
        ],
        {"known text"},
    )
    assert found == [Triple("1", "a", "Insert row", "Zeile einfügen", "插入行")]


def test_nothing_like_a_held_out_sentence_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"id": "test-1", "page": "held", "split": "test", "en": "Deletes the selected row"}
    held |= {"de": "Löscht die markierte Zeile", "zh": "删除选中的行"}
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps(held) + "\n", encoding="utf-8")
    candidates = [
        Triple("1", "other", "Deletes the selected rows.", "Löscht markierte Zeilen", ""),
        Triple("2", "other", "Opens a new window", "Öffnet ein neues Fenster", ""),
        Triple("3", "held", "Stands on the held-out page", "Steht auf der Seite", ""),
    ]
    for name in ("fetch_help", "fetch_interface"):
        monkeypatch.setattr(more_text, name, lambda cache: cache)
    monkeypatch.setattr(more_text, "help_pairs", lambda root: iter(candidates))
    monkeypatch.setattr(more_text, "interface_pairs", lambda root: iter(()))
    out = tmp_path / "more.jsonl"
    assert more_text.main(["--text", str(text), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["2"]
    assert lines[0]["split"] == "train" and "zh" not in lines[0]


def test_transcripts_of_recorded_speech_are_read_without_their_marks(tmp_path: Path) -> None:
    (tmp_path / "transcription").write_text("<s> he was  Here </s> (book-0870)\n", encoding="utf-8")
    assert measure_recorded.read_transcripts(tmp_path) == {"book-0870": "he was here"}
