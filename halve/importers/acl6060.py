"""The ACL 60/60 release (Salesky et al., IWSLT 2023, aclanthology 2023.iwslt-1.2, CC BY 4.0).

Assumed of the unpacked archive, `2/acl_6060/{dev,eval}/`:
    segmented_wavs/gold/sent_N.wav                  N from 1, over all talks of the set
    text/xml/ACL.6060.{dev,eval}.en-xx.LANG.xml     <doc docid="talk"> of <seg id="…">, in the order of N
    text/txt/ACL.6060.{dev,eval}.en-xx.LANG.txt     the same sentences, one a line
Abstracts inside the XML hold characters that break parsers, so segments are matched as text. Where a set
has no XML the txt files are read and the whole set counts as one group. `source` may be any directory above.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path

from halve.errors import CorpusError
from halve.importers.base import (
    CorpusConfig,
    Row,
    Rows,
    below,
    known_language,
    read_lines,
    source_dir,
    wanted_languages,
)

_NAME = re.compile(r"ACL\.6060\.(dev|eval)\.en-xx\.([a-z]{2})\.(xml|txt)$")
_TOKEN = re.compile(r'<doc\b[^>]*\bdocid="([^"]*)"|<seg\b[^>]*>(.*?)</seg>', re.DOTALL)
_WAV = re.compile(r"sent_(\d+)\.wav$")
# dev before eval: the paper's data is "dev+eval" joined in this order.
_SETS = {"dev": "select", "eval": "test"}


def import_acl6060(source: str, config: CorpusConfig) -> Rows:
    """Reads dev and eval (or the one that is there).

    Raises:
        CorpusError: neither is there, or the files of one disagree in number.
    """
    root = source_dir(source, "acl6060")
    found = Rows()
    for name in _SETS:
        for folder in _set_dirs(root, name):
            _import_set(folder, name, config, found)
    if not found.rows and not found.set_faults:
        raise CorpusError(
            f"{root} has no segmented_wavs/gold",
            expected="the unpacked archive: …/acl_6060/dev and …/acl_6060/eval",
            mend="name the directory into which 2023.iwslt-1.2.dataset.zip was unpacked",
        )
    return found


def _set_dirs(root: Path, name: str) -> Iterator[Path]:
    for path in [root, *below(root)]:
        if path.name == name and (path / "segmented_wavs" / "gold").is_dir():
            yield path


def _import_set(folder: Path, name: str, config: CorpusConfig, found: Rows) -> None:
    wavs = sorted(
        (int(match[1]), path)
        for path in (folder / "segmented_wavs" / "gold").iterdir()
        if (match := _WAV.search(path.name))
    )
    gaps = _gaps([number for number, _ in wavs])
    if gaps:
        found.set_faults.append(f"{folder / 'segmented_wavs' / 'gold'}: {gaps}")
    files = _texts(folder, name)
    targets = wanted_languages(files, config)
    texts: dict[str, list[tuple[str, str, str]]] = {}
    for lang in [config.source_lang, *targets]:
        if lang not in files:
            continue
        texts[lang] = list(_sentences(files[lang]))
        if len(texts[lang]) != len(wavs):
            found.set_faults.append(
                f"{files[lang]}: {len(texts[lang])} sentences for {len(wavs)} files in segmented_wavs/gold"
            )
    if gaps or any(len(lines) != len(wavs) for lines in texts.values()):
        return
    for index, (number, wav) in enumerate(wavs):
        where, talk, _ = texts[targets[0]][index]
        found.rows.append(
            Row(
                where=where,
                id=f"{name}-{number:04d}",
                audio=wav,
                source_text=texts[config.source_lang][index][2]
                if config.source_lang in texts
                else "",
                references={lang: texts[lang][index][2] for lang in targets},
                split=_SETS[name],
                group=talk or f"acl6060-{name}",
            )
        )


def _gaps(numbers: list[int]) -> str:
    """What keeps the sorted numbers from being 1 to n: sent_7.wav is the seventh sentence, whatever is missing."""
    for expected, number in enumerate(numbers, start=1):
        if number != expected:
            return (
                f"where sent_{expected}.wav should be stands sent_{number}.wav; "
                f"the {len(numbers)} files must be numbered 1 to {len(numbers)}"
            )
    return ""


def _texts(folder: Path, name: str) -> dict[str, Path]:
    """The text file of each language, XML before txt."""
    files: dict[str, Path] = {}
    for kind in ("xml", "txt"):
        for path in sorted((folder / "text" / kind).glob(f"*.{kind}")):
            match = _NAME.search(path.name)
            code = known_language(match[2]) if match and match[1] == name else None
            if code:
                files.setdefault(code, path)
    return files


def _sentences(path: Path) -> Iterator[tuple[str, str, str]]:
    """(file:line, talk, sentence) of each segment of an XML or txt file."""
    if path.suffix == ".txt":
        for number, line in enumerate(read_lines(path), start=1):
            yield f"{path}:{number}", "", line.strip()
        return
    text = "\n".join(read_lines(path))
    talk = ""
    place, last, told = 1, 0, 0
    for match in _TOKEN.finditer(text):
        place, last = place + text.count("\n", last, match.start()), match.start()
        if match[1] is not None:
            talk = match[1]
        else:
            column = match.start() - text.rfind("\n", 0, match.start())
            where = f"{path}:{place}" if place != told else f"{path}:{place}:{column}"
            told = place
            yield where, talk, " ".join(html.unescape(match[2]).split())
