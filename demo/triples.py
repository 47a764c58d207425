"""English-German-Chinese sentence triples from the LibreOffice help pages, fit to be spoken.

The help pages of the three languages share their paths and the ids of their paragraphs and
headings, so the alignment needs no statistics: same page, same id, same ordinal. A paragraph is
cut into sentences only where the three languages agree on the number of sentences.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

LANGUAGE_FOLDERS = {"en": "en-US", "de": "de", "zh": "zh-CN"}
MIN_WORDS, MAX_WORDS = 3, 30

# Stands in the text for what has no spoken form (code, icons, superscripts).
UNSPEAKABLE = "\ue000"

_BLOCK_TAGS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6"})
_VOID_TAGS = frozenset({"br", "img", "meta", "input", "link", "hr"})
_CODE_TAGS = frozenset({"pre", "code", "sup", "sub"})
_CODE_CLASSES = frozenset({"literal", "input"})
_SKIPPED_BLOCKS = frozenset({"code", "codeintable", "smathcode", "image", "related", "bug"})


@dataclass(frozen=True)
class Triple:
    """One sentence in three languages; `page` is the help page it stands on."""

    id: str
    page: str
    en: str
    de: str
    zh: str


class _PageParser(HTMLParser):
    """Collects `{(paragraph id, ordinal): text}` of one help page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: dict[tuple[str, int], str] = {}
        self._seen: dict[str, int] = defaultdict(int)
        self._block: tuple[str, str] | None = None  # (tag, id) of the open paragraph
        self._pieces: list[str] = []
        self._inline: list[tuple[str, bool]] = []  # (tag, hidden) inside the open paragraph
        self._in_note = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        classes = set(attributes.get("class", "").split())
        if self._block is None:
            if tag == "div":
                self._in_note = "notetext" in classes
            elif tag in _BLOCK_TAGS and not classes & _SKIPPED_BLOCKS:
                # Notes carry no id of their own; their ordinal on the page aligns them.
                name = attributes.get("id") or ("note" if self._in_note else "")
                if name:
                    self._block, self._pieces, self._inline = (tag, name), [], []
            return
        if tag in _VOID_TAGS:
            self._pieces.append(UNSPEAKABLE if tag == "img" else " ")
            return
        if tag in _CODE_TAGS or classes & _CODE_CLASSES:
            self._pieces.append(UNSPEAKABLE)
        # What differs between systems and modules (keys, menus) is hidden until a script chooses;
        # a reader sees the default.
        hidden = "hidden" in attributes and not attributes.get("id", "").startswith("default")
        self._inline.append((tag, hidden))

    def handle_endtag(self, tag: str) -> None:
        if self._block is None:
            return
        if tag == self._block[0]:
            name = self._block[1]
            ordinal = self._seen[name]
            self._seen[name] += 1
            self.paragraphs[name, ordinal] = " ".join("".join(self._pieces).split())
            self._block = None
            return
        for depth in range(len(self._inline) - 1, -1, -1):
            if self._inline[depth][0] == tag:
                del self._inline[depth:]
                break

    def handle_data(self, data: str) -> None:
        if self._block is not None and not any(hidden for _, hidden in self._inline):
            self._pieces.append(data)


def page_paragraphs(html: str) -> dict[tuple[str, int], str]:
    """Text of each paragraph and heading of a help page, by (id, ordinal of that id)."""
    parser = _PageParser()
    parser.feed(html)
    parser.close()
    return parser.paragraphs


# --- sentences ---------------------------------------------------------------------------------

_ABBREVIATIONS = re.compile(
    r"\b(?:e\.\s?g|i\.\s?e|etc|vs|approx|No|z\.\s?B|d\.\s?h|u\.\s?a|usw|bzw|ggf|ca|Nr|evtl|o\.\s?ä"
    r"|u\.\s?U|inkl|max|min|z\.\s?T)\."
)
_LATIN_BREAK = re.compile(r"(?<=[.!?])[\"”“»]?\s+(?=[\"„“«]?[A-ZÄÖÜ])")
_CHINESE_BREAK = re.compile(r"(?<=[。！？])[”」]?\s*(?=\S)")
_KEPT_DOT = "\ue001"


def split_sentences(text: str, lang: str) -> list[str]:
    """Sentences of a paragraph in `lang` (en, de, zh); an abbreviation's full stop ends none."""
    if lang == "zh":
        return [part.strip() for part in _CHINESE_BREAK.split(text) if part.strip()]
    guarded = _ABBREVIATIONS.sub(lambda found: found.group().replace(".", _KEPT_DOT), text)
    parts = _LATIN_BREAK.split(guarded)
    return [part.replace(_KEPT_DOT, ".").strip() for part in parts if part.strip()]


def aligned_sentences(paragraphs: dict[str, str]) -> list[dict[str, str]]:
    """Sentence triples of one paragraph {lang: text}; none where the three counts differ."""
    sentences = {lang: split_sentences(text, lang) for lang, text in paragraphs.items()}
    if len({len(found) for found in sentences.values()}) != 1:
        return []
    langs = list(sentences)
    return [dict(zip(langs, row, strict=True)) for row in zip(*sentences.values(), strict=True)]


# --- cleaning ----------------------------------------------------------------------------------

# Nobody hears quotation marks, and the three languages set them by different habits.
_QUOTES = re.compile(r"[\"“”„‟«»「」『』]|(?<!\w)['‘’‚‹›]|['‘’‚‹›](?!\w)")
_SPACES_BEFORE_STOP = re.compile(r"\s+([.,;:!?。，；：！？、])")
_SPACES_BY_CHINESE = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef])\s+|\s+(?=[\u3000-\u9fff\uff00-\uffef])"
)
_HALF_WIDTH_STOP = re.compile(r"(?<=[\u4e00-\u9fffA-Za-z])\s*([,:;?!])\s*(?=[\u4e00-\u9fff])")
_FULL_WIDTH = str.maketrans(",:;?!", "，：；？！")


def tidy(text: str, lang: str) -> str:
    """Text without quotation marks, stray spaces and characters that only typography needs."""
    text = text.replace("\u00a0", " ").replace("\u200b", "").replace("\u00ad", "")
    text = _QUOTES.sub("", text)
    text = re.sub(r"\.\.\.|…", "", text)  # the dots of a menu entry that opens a dialog
    text = _SPACES_BEFORE_STOP.sub(r"\1", " ".join(text.split()))
    if lang == "en":
        text = text.replace(" & ", " and ")
    if lang == "zh":
        text = _SPACES_BY_CHINESE.sub("", text)
        text = _HALF_WIDTH_STOP.sub(lambda found: found[1].translate(_FULL_WIDTH), text)
    return text.strip(" ·•*-–—")


_PARENTHESIS = re.compile(r"\s*[(（][^()（）]*[)）]")


def without_parenthesis(row: dict[str, str]) -> dict[str, str]:
    """The sentences without their parenthesis, if each language has exactly one."""
    counts = {len(_PARENTHESIS.findall(text)) for text in row.values()}
    return {k: _PARENTHESIS.sub("", v) for k, v in row.items()} if counts == {1} else row


_ENGLISH = re.compile(r"[A-Za-zé0-9 ,.;:!?'’-]+")
_GERMAN = re.compile(r"[A-Za-zÄÖÜäöüßéèáàç0-9 ,.;:!?'’–-]+")
_CHINESE = re.compile(r"[A-Za-z0-9 ,.\u4e00-\u9fff，。、；：！？·-]+")
_MENU_PATH = re.compile(r"\s[-–—]\s|\s-|-\s(?!und\b|oder\b|bzw)|▸")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_ODD_NUMBER = re.compile(
    r"\d{5,}|\d+[.,]\d+[.,]\d+|(?!\bF)[A-Za-z]\d|\d(?!D\b)[A-Za-z]|\d[.:]\d*$|\d:\d"
)
_DOTTED_NAME = re.compile(r"[A-Za-z_]\.[A-Za-z_]|\.[a-z]|\w_\w|://|www")
# An article before a stop: something unspeakable, such as an icon, has gone from the sentence.
_GAP = re.compile(
    r"\b(?:the|an?|hold down|holding down)\s*[,.;:]|,\s*[,;]|\b(?:the|an?)$|\bthe with\b"
)
_CAPITALS = re.compile(r"\b[A-Z]{2,}s?\b")
_INNER_CAPITAL = re.compile(r"\b[a-zA-Z]*[a-z][A-Z][A-Za-z]*\b")
_SPOKEN_ACRONYMS = frozenset(
    re.findall(
        r"\w+",
        "PDF PDFs HTML XML URL URLs SQL USB CSV ODF OK ASCII FTP HTTP SVG PNG RGB CMYK JDBC ODBC"
        " LDAP DDE OLE CD DVD PC VBA IP TV UK USA US ID IDs GIF JPEG TIFF API SDK BASIC GUI CSS DPI"
        " UNO AND OR NOT WWW JRE GPG RTF MS HSB GB MB KB EU AM PM",
    )
)
# Parts of compound names that read as their parts: AutoCorrect does, BibTeX does not.
_SPOKEN_PARTS = frozenset(
    re.findall(
        r"\w+",
        "Auto Filters Values Map Image Libre Office Correct Text Format Fill Filter Input Spell Check"
        " Layout Recovery Complete Sum Caption Abstract Font Work Java Script Open Document Word Power"
        " Point Post Type Pilot Data Drop Cap Caps Visi Calc Basic Form Web You Tube Outline Tip Tips"
        " Content Macro My SQL Unicode Page Navi Pi Star Perfect Linux Free Hand",
    )
)
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_ABBREVIATED = {"e.g.": "for example", "i.e.": "that is", "etc.": "et cetera", "vs.": "versus"}


def spoken_form(text: str) -> str:
    """What the synthesiser is given: abbreviations read out, compound names in their parts."""
    for short, full in _ABBREVIATED.items():
        text = text.replace(short, full)
    text = _INNER_CAPITAL.sub(lambda found: " ".join(_PARTS.findall(found.group())), text)
    text = re.sub(r"\bCtrl\b", "control", text)
    text = re.sub(r"\b(F)(\d)|(\d)(D)\b", r"\1\3 \2\4", text)  # keys and 3D
    return text.replace("’", "'")


def english_can_be_spoken(text: str) -> bool:
    """Whether a tidied English text has neither code nor names that nobody would say; of any length."""
    plain = text
    for short in _ABBREVIATED:
        plain = plain.replace(short, short.replace(".", ""))
    capitals = set(_CAPITALS.findall(plain))
    compounds = [part for word in _INNER_CAPITAL.findall(plain) for part in _PARTS.findall(word)]
    return (
        _ENGLISH.fullmatch(plain) is not None
        and not _MENU_PATH.search(plain)
        and not _DOTTED_NAME.search(plain)
        and not _ODD_NUMBER.search(plain)
        and len(_NUMBER.findall(plain)) <= 2
        and capitals <= _SPOKEN_ACRONYMS
        and all(part in _SPOKEN_PARTS for part in compounds)
        and not re.search(r"\b[b-hj-wB-HJ-W]\b", plain.replace("’", "'").replace("'", ""))
        and plain.count(":") + plain.count(";") <= 1
        and plain[0] not in "abcdefghijklmnopqrstuvwxyz,.;:"
        and plain[-1] not in ",;:"
        and not _GAP.search(plain)
        and ".." not in plain
    )


def _numbers(text: str) -> list[str]:
    return sorted(_NUMBER.findall(text.replace(",", ".")))


def can_be_spoken(en: str, de: str, zh: str) -> bool:
    """Whether a tidied triple is a sentence to say aloud, and its translations answer to it.

    Refuses code, formulas, menu paths, brackets, addresses, names of functions, many or odd
    numbers, other lengths than 3 to 30 English words, and translations that are untranslated,
    of an implausible length or with other numbers than the English.
    """
    words = len(en.split())
    chinese = len(re.findall(r"[\u4e00-\u9fff]", zh))
    latin = len(re.findall(r"[A-Za-z]", zh))
    return (
        MIN_WORDS <= words <= MAX_WORDS
        and english_can_be_spoken(en)
        and _GERMAN.fullmatch(de) is not None
        and _CHINESE.fullmatch(zh) is not None
        and not re.search(r"\s[–-]\s", de)
        and "-" not in re.sub(r"[A-Za-z0-9]-[A-Za-z0-9]", "", zh)
        and not re.search(r"[A-Za-z_]\.[A-Za-z_]|\w_\w", de.replace("z.B.", "").replace("d.h.", ""))
        and not re.search(r",\s*,|，，", f"{de}\n{zh}")
        and de != en
        and 0.5 <= len(de) / len(en) <= 2.5
        and 0.4 * words <= chinese <= 5.0 * words
        and chinese >= 2
        and latin <= 2.5 * chinese
        and _numbers(en) == _numbers(de)
        and len(_NUMBER.findall(zh)) <= 3
    )


def extract_triples(help_root: Path) -> Iterator[Triple]:
    """Every distinct speakable triple under `help_root` (the folder of en-US, de, zh-CN).

    Pages in the order of their paths, sentences in the order of the English page. Of sentences
    with the same English (case and punctuation apart) the first is kept.
    """
    seen: set[str] = set()
    english_root = help_root / LANGUAGE_FOLDERS["en"] / "text"
    for english_page in sorted(english_root.rglob("*.html")):
        page = english_page.relative_to(english_root).with_suffix("").as_posix()
        files = {
            lang: help_root / folder / "text" / f"{page}.html"
            for lang, folder in LANGUAGE_FOLDERS.items()
        }
        if not all(file.is_file() for file in files.values()):
            continue
        for triple in page_triples(
            page, {lang: file.read_text(encoding="utf-8") for lang, file in files.items()}
        ):
            key = " ".join(re.findall(r"\w+", triple.en.casefold()))
            if key not in seen:
                seen.add(key)
                yield triple


def page_triples(page: str, html: dict[str, str]) -> Iterator[Triple]:
    """Speakable triples of one page given as {lang: HTML}, in the order of the English page."""
    paragraphs = {lang: page_paragraphs(text) for lang, text in html.items()}
    notes = {sum(name == "note" for name, _ in found) for found in paragraphs.values()}
    for name, ordinal in paragraphs["en"]:
        key = (name, ordinal)
        if not all(key in found for found in paragraphs.values()):
            continue
        if name == "note" and len(notes) != 1:
            continue  # ordinals of notes align only where each language has all of them
        rows = aligned_sentences({lang: found[key] for lang, found in paragraphs.items()})
        for index, row in enumerate(map(without_parenthesis, rows)):
            en, de, zh = (tidy(row[lang], lang) for lang in ("en", "de", "zh"))
            if can_be_spoken(en, de, zh):
                yield Triple(f"{page}#{name}.{ordinal}.{index}", page, en, de, zh)
