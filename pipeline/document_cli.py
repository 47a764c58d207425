"""Writes docs/cli.md from the commands themselves: `python -m pipeline.document_cli` (or `make docs`)."""

from pathlib import Path
from typing import Any

import typer.main

from pipeline.cli import app

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_INTRODUCTION = """\
# Command line

Made by `python -m pipeline.document_cli`; a test compares it with the commands.

Results go to stdout, progress and messages to stderr. Every command takes `--json` (the result as JSON) and
`--debug` (tracebacks). Exit codes: 0 done; 1 failed (disk, memory, network, parity); 2 wrong usage or bad
input; 130 stopped by Ctrl-C, run again to go on. `--out` defaults to a folder under `runs/` (`HALVE_RUNS`)
that the same command finds again: what is up to date is not made twice.
Options that take several values may be repeated; words and numbers may also be separated by commas, paths and hypotheses follow one another
(`--students A B`).
"""


def document() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for path, command in _commands(typer.main.get_command(app), "halve"):
        parts.append(_section(path, command))
    return "\n".join(parts)


def _commands(group: Any, path: str) -> list[tuple[str, Any]]:
    found = []
    for name, command in group.commands.items():
        inner = f"{path} {name}"
        found += _commands(command, inner) if hasattr(command, "commands") else [(inner, command)]
    return found


def _section(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in _COMMON]
    usage = " ".join(
        [path, *(_argument(p) for p in arguments), "[OPTIONS]" if options else ""]
    ).strip()
    lines = [f"## {path}", "", " ".join((command.help or "").split()), "", f"```\n{usage}\n```", ""]
    if arguments or options:
        lines += ["| option | what | default |", "|---|---|---|"]
        lines += [_row(f"`{_argument(p)}`", p) for p in arguments]
        lines += [_row(_names(p), p) for p in sorted(options, key=lambda p: not p.required)]
        lines.append("")
    return "\n".join(lines)


_COMMON = ("as_json", "debug", "help")


def _argument(parameter: Any) -> str:
    name = parameter.name.upper()
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag or parameter.secondary_opts:
        return names
    return f"{names} {(parameter.metavar or 'VALUE').replace('|', ' / ')}"


def _row(name: str, parameter: Any) -> str:
    text = " ".join((getattr(parameter, "help", "") or "").split())
    shown = getattr(parameter, "show_default", None)
    default = "required" if parameter.required else shown if isinstance(shown, str) else ""
    if not default and parameter.default not in (None, False, (), []) and not parameter.required:
        default = str(parameter.default)
    cells = (name, text, default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Writes the page."""
    TARGET.write_text(document(), encoding="utf8")


if __name__ == "__main__":
    main()
