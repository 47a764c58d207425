"""Prints a report's Markdown in the terminal.

python demo/show_report.py runs/demo/report
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown


def main(report: str) -> None:
    """Renders report.md."""
    text = (Path(report) / "report.md").read_text(encoding="utf8")
    Console().print(Markdown(text))


if __name__ == "__main__":
    main(sys.argv[1])
