"""Plain parallel text: files of one language each, one sentence a line, for models that read."""

from collections import defaultdict
from pathlib import Path

from halve.errors import CorpusError
from halve.importers.base import (
    CorpusConfig,
    Row,
    Rows,
    by_language,
    read_lines,
    source_dir,
    split_of_set,
    wanted_languages,
)


def import_text(source: str, config: CorpusConfig) -> Rows:
    """A directory of NAME.LANG files (train.en, train.de, wmt24.en, …) whose lines belong together.

    A name that contains train, dev (valid, select) or test says the split; each name is a group, each of
    its lines where names do not say their splits.

    Raises:
        CorpusError: no file of the source language, or none of a target language.
    """
    folder = source_dir(source, "text")
    texts = _files(folder, config)
    languages = {lang for files in texts.values() for lang in files}
    if config.source_lang not in languages:
        raise CorpusError(
            f"{folder} has no file in {config.source_lang}, the source language",
            expected=f"NAME.{config.source_lang} beside NAME.LANG for each target language",
            mend="name another one with --source-lang",
        )
    targets = wanted_languages(languages, config)
    found = Rows()
    for name, files in sorted(texts.items()):
        if config.source_lang in files and any(lang in files for lang in targets):
            _read(found, name, files, targets, config)
        elif set(files) & {config.source_lang, *targets}:
            there = ", ".join(path.name for path in files.values())
            found.warnings.append(
                f"{folder / name}.* is left aside: {there} alone, no text beside it"
            )
    return found


def _files(folder: Path, config: CorpusConfig) -> dict[str, dict[str, Path]]:
    """The files by name, then language."""
    named: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            named[path.stem].append((path.suffix.removeprefix("."), path))
    found = {name: by_language(paths, folder, config) for name, paths in named.items()}
    return {name: files for name, files in found.items() if files}


def _read(
    found: Rows, name: str, files: dict[str, Path], targets: list[str], config: CorpusConfig
) -> None:
    lines = {
        lang: read_lines(path)
        for lang, path in files.items()
        if lang in (config.source_lang, *targets)
    }
    source = lines.pop(config.source_lang)
    for lang, texts in lines.items():
        if len(texts) != len(source):
            found.set_faults.append(
                f"{files[lang]}: {len(texts)} lines, {files[config.source_lang].name} has {len(source)}"
            )
            return
    split = split_of_set(name)
    for number, text in enumerate(source, start=1):
        ident = f"{name}-{number:06d}"
        found.rows.append(
            Row(
                where=f"{files[config.source_lang]}:{number}",
                id=ident,
                audio=None,
                source_text=text.strip(),
                references={lang: texts[number - 1].strip() for lang, texts in lines.items()},
                split=split,
                # Dealt out anew, a whole file would go one way.
                group=name if split and config.split != "group" else ident,
            )
        )
