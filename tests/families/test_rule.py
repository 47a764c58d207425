"""Only `halve/families/` names an architecture, and nothing runs a model's own code."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from halve.families import FAMILIES
from halve.models import load_model
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("halve", "compress", "export", "pipeline", "serve")
NAMES = {name for each in FAMILIES.values() for name in (each.name, *each.model_types)} - {"text"}
"""Names and model types of all families; `text` is a word that is needed elsewhere."""


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in (ROOT / folder).rglob("*.py"))


def test_no_other_module_names_an_architecture() -> None:
    families = ROOT / "halve" / "families"
    others = [path for path in modules(*FOLDERS) if families not in path.parents]
    assert len(others) > 50
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in others
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert not found


def test_foreign_code_is_never_asked_for() -> None:
    word = "trust_remote_code"
    looked_at = list(modules(*FOLDERS, "benchmarks", "demo"))
    assert not [path for path in looked_at if word in path.read_text(encoding="utf8")]


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    model, mark = tiny.make_model(tmp_path / "model"), tmp_path / "ran"
    (model / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf8")
    for name, key in (("config.json", "AutoModel"), ("processor_config.json", "AutoProcessor")):
        config = json.loads((model / name).read_text(encoding="utf8"))
        config["auto_map"] = {
            key: "modeling_own.Own",
            "AutoConfig": "modeling_own.Own",
            "AutoModelForMultimodalLM": "modeling_own.Own",
        }
        (model / name).write_text(json.dumps(config), encoding="utf8")
    assert load_model(model).family.name == "qwen2_audio"
    assert not mark.exists()
