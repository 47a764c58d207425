"""JSON files that a kill leaves whole: small ones are replaced, records are appended line by line."""

import json
import os
from pathlib import Path
from typing import Any

from halve.errors import ArtefactError


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, readable, ending in a newline; a kill leaves the old file or the new one."""
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def append_jsonl(path: Path, record: Any) -> None:
    """Appends one line and flushes it to disk: a kill loses at most the line being written."""
    mend_torn_line(path)
    with open(path, "ab") as file:
        file.write(json.dumps(record, ensure_ascii=False, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def mend_torn_line(path: Path) -> None:
    """Cuts off a last line that a kill left without its newline."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_jsonl(path: Path) -> list[Any]:
    """All lines of a JSON-lines file; a torn last line is left out, a missing file is empty.

    Raises:
        ArtefactError: a line other than a torn last one is not JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip():
            records.append(_parse(path, line, f"line {number}"))
    return records


def _parse(path: Path, text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ArtefactError(f"{path}, {where}: not JSON ({error})", mend="make it again") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ArtefactError: missing, or not JSON.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file")
    return _parse(path, path.read_bytes(), "the file")
