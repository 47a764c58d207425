"""More text for the teacher's warm-up: what nobody would say aloud still teaches a decoder to translate.

    python -m demo.more_text --text text.jsonl --out more.jsonl

Two sources, both under MPL-2.0: sentences of the LibreOffice help that the corpus of speech leaves out (lists,
menu paths, one language missing), and the strings of LibreOffice's own interface. Nothing of a page that holds
`select` or `test` sentences is taken, and nothing that is too alike to one of them (demo/splits.py).
"""

from __future__ import annotations

import argparse
import gettext
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from demo.packages import fetch_help, fetch_interface
from demo.splits import too_alike
from demo.triples import LANGUAGE_FOLDERS, Triple, aligned_sentences, page_paragraphs, tidy

MIN_WORDS, MAX_WORDS = 1, 40
_TEXT = re.compile(r"[^\ue000-\uf8ff{}<>=\\|@#$^*_\[\]~`]+")
_NAME = re.compile(r"[A-Za-z_]\.[A-Za-z_]|://|www|\.[a-z]{2,4}\b")
_LETTERS = re.compile(r"[A-Za-z]{2}")
_HAN = re.compile(r"[\u4e00-\u9fff]")
# The letter that a key press chooses: _File, ~File, 文件(_F).
_MNEMONIC = re.compile(r"\s*[(（][_~&][A-Za-z0-9][)）]|[_~](?=\w)")


def _is_pair(en: str, other: str, lang: str) -> bool:
    """Whether a tidied text and its translation can be learnt from."""
    if not other or other == en or _TEXT.fullmatch(other) is None or _NAME.search(other):
        return False
    if lang == "zh":
        han = len(_HAN.findall(other))
        return 0.3 * len(en.split()) <= han <= 6.0 * len(en.split())
    return 0.4 <= len(other) / len(en) <= 3.0 and _LETTERS.search(other) is not None


def pairs(name: str, page: str, row: dict[str, str]) -> Triple | None:
    """The translations of an English text that are fit to learn from ("" where one is not), if any."""
    texts = {lang: tidy(text, lang) for lang, text in row.items()}
    en = texts["en"]
    if (
        not MIN_WORDS <= len(en.split()) <= MAX_WORDS
        or _TEXT.fullmatch(en) is None
        or _NAME.search(en)
        or not _LETTERS.search(en)
    ):
        return None
    found = {
        lang: texts.get(lang, "") if _is_pair(en, texts.get(lang, ""), lang) else ""
        for lang in ("de", "zh")
    }
    return Triple(name, page, en, **found) if any(found.values()) else None


def help_pairs(help_root: Path) -> Iterator[Triple]:
    """Sentences of every help page, German and Chinese each where it aligns with the English."""
    english_root = help_root / LANGUAGE_FOLDERS["en"] / "text"
    for english_page in sorted(english_root.rglob("*.html")):
        page = english_page.relative_to(english_root).with_suffix("").as_posix()
        paragraphs = {}
        for lang, folder in LANGUAGE_FOLDERS.items():
            file = help_root / folder / "text" / f"{page}.html"
            paragraphs[lang] = (
                page_paragraphs(file.read_text(encoding="utf-8")) if file.is_file() else {}
            )
        for key in paragraphs["en"]:
            if key[0] == "note":
                continue  # notes have no id of their own
            by_text: dict[str, dict[str, str]] = {}
            for lang in ("de", "zh"):
                if key not in paragraphs[lang]:
                    continue
                both = {"en": paragraphs["en"][key], lang: paragraphs[lang][key]}
                for sentence in aligned_sentences(both):
                    by_text.setdefault(sentence["en"], {}).update(sentence)
            for index, row in enumerate(by_text.values()):
                found = pairs(f"{page}#{key[0]}.{key[1]}.{index}", page, row)
                if found:
                    yield found


def interface_pairs(root: Path) -> Iterator[Triple]:
    """Strings of the interface: labels, tips, messages; `root` holds de/ and zh_CN/."""
    for german in sorted((root / "de" / "LC_MESSAGES").glob("*.mo")):
        texts = {"de": _catalogue(german)}
        chinese = root / "zh_CN" / "LC_MESSAGES" / german.name
        texts["zh"] = _catalogue(chinese) if chinese.is_file() else {}
        for key in texts["de"]:
            row = {"en": key.split("\x04")[-1]}
            row |= {lang: found[key] for lang, found in texts.items() if key in found}
            plain = {lang: _MNEMONIC.sub("", text) for lang, text in row.items()}
            found = pairs(f"ui/{german.stem}/{key.split(chr(4))[0]}", f"ui/{german.stem}", plain)
            if found:
                yield found


def _catalogue(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return {k: v for k, v in catalogue.items() if isinstance(k, str) and k and v}


def merged(found: Iterable[Triple], known: set[str]) -> list[Triple]:
    """One entry an English text that is not in `known`; each language's first translation is kept."""
    kept: dict[str, Triple] = {}
    for triple in found:
        key = plain_words(triple.en)
        if key in known or not key:
            continue
        before = kept.get(key, triple)
        kept[key] = Triple(
            before.id, before.page, before.en, before.de or triple.de, before.zh or triple.zh
        )
    return list(kept.values())


def plain_words(text: str) -> str:
    """A text without case and punctuation: what makes two entries the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def main(arguments: list[str] | None = None) -> int:
    """Writes the lines: id, page, split (always train), en and de, zh or both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="what build_corpus --text-only wrote"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/packages"))
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.text.read_text(encoding="utf-8").splitlines()]
    held = [
        Triple(row["id"], row["page"], row["en"], row["de"], row["zh"])
        for row in rows
        if row["split"] != "train"
    ]
    held_pages = {triple.page for triple in held}
    candidates = [
        triple
        for source in (
            help_pairs(fetch_help(options.cache)),
            interface_pairs(fetch_interface(options.cache)),
        )
        for triple in source
        if triple.page not in held_pages
    ]
    kept = merged(candidates, {plain_words(row["en"]) for row in rows})
    gone = set().union(*too_alike(held, kept))
    with options.out.open("w", encoding="utf-8") as file:
        for number, triple in enumerate(kept):
            if number in gone:
                continue
            line = {"id": triple.id, "page": triple.page, "split": "train", "en": triple.en}
            line |= {lang: getattr(triple, lang) for lang in ("de", "zh") if getattr(triple, lang)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(
        f"{len(kept) - len(gone)} entries, {len(gone)} too alike to select or test", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
