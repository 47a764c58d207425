"""Translates a text file line by line with the package that this file lies in. See run.sh."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "code"))

from export.runtime import open_translator  # noqa: E402
from halve.checks import doubtful_lines  # noqa: E402
from halve.errors import HalveError  # noqa: E402
from halve.families import SourceText  # noqa: E402
from halve.languages import language  # noqa: E402

LINES_AT_ONCE = 2048
"""Lines read before they are put into batches of like length."""


def translate(lang_pair: str, batch_size: int, input_file: Path, output_file: Path) -> list[str]:
    """Writes one line for each line of the input; returns what looks wrong with them.

    Raises:
        InputError: a language that halve does not know, or that the package does not translate into.
    """
    source, _, target = lang_pair.partition("-")
    source, target = language(source).code, language(target).code
    # A line feed ends a line; what else Unicode calls a line's end, a carriage return too, stands inside.
    text = input_file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    lines = text.split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    translator = open_translator(HERE)
    written: list[str] = []
    with output_file.open("w", encoding="utf-8") as output:
        for start in range(0, len(lines), LINES_AT_ONCE):
            block = lines[start : start + LINES_AT_ONCE]
            texts = [SourceText(line, source) for line in block if line.strip()]
            found = iter(translator.translate(texts, target, batch_size=batch_size))
            for line in block:
                written.append(" ".join(next(found).text.split()) if line.strip() else "")
                output.write(written[-1] + "\n")
    return doubtful_lines(written, [len(line.strip()) for line in lines], len(lines))


def main() -> int:
    """Reads the command line; 0 if every line is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only open the model")
    parser.add_argument("--lang-pair", help="source and target, as en-de")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    try:
        if options.check:
            open_translator(HERE).close()
            return 0
        if not (options.lang_pair and options.input and options.output):
            parser.error("--lang-pair, --input and --output are needed")
        for fault in translate(
            options.lang_pair, options.batch_size, options.input, options.output
        ):
            print(f"check: {fault}", file=sys.stderr)
    except (HalveError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
