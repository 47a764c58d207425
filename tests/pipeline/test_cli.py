"""The command line itself."""

import importlib.metadata
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import typer

from halve.artefact import writing
from halve.errors import CorpusError, InputError
from pipeline import doctor, document_cli, failures
from pipeline.clean import find
from pipeline.cli import app, main
from pipeline.options import settings_from, speaks
from pipeline.shell import keep_apart, spread_lists
from pipeline.translate import pieces_of_segments
from tests import tiny
from tests.pipeline.conftest import ROOT, Halve, environment

_HEAVY = ("torch", "transformers", "onnxruntime", "fastapi", "matplotlib", "sacrebleu")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom pipeline.cli import main\n"
        "try: main(['importance', '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        f"sys.exit(','.join(name for name in {_HEAVY} if name in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"--help imports {done.stderr}"
    assert "--remove" in done.stdout


def test_the_documentation_is_current() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf8")
    assert written == document_cli.document(), "run `make docs`"
    for command in ("importance", "bench quality", "serve", "doctor"):
        assert f"## halve {command}\n" in written


def test_what_is_shown_as_a_list_is_taken_as_one() -> None:
    for words, command in document_cli._commands(typer.main.get_command(app), ""):
        for option in command.params:
            if option.multiple and (option.metavar or "").endswith("..."):
                name = option.opts[0]
                given = [*words.split(), name, "a", "b"]
                assert spread_lists(given) == [*words.split(), name, "a", name, "b"], (words, name)


def test_lists_may_follow_their_option() -> None:
    given = ["bench", "quality", "--students", "a", "b", "--teacher", "t", "--json"]
    spread = ["bench", "quality", "--students", "a", "--students", "b", "--teacher", "t", "--json"]
    assert spread_lists(given) == spread
    # It scores one language: a second one is wrong usage, not the one that counts.
    given = ["bench", "quality", "--lang", "de", "zh"]
    assert spread_lists(given) == given
    assert spread_lists(["translate", "--lang", "de", "a.wav"]) == [
        "translate",
        "--lang",
        "de",
        "a.wav",
    ]


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (OSError(28, "No space left on device", "x"), 1, "full"),
        (OSError(30, "Read-only file system", "x"), 1, "read-only"),
        (PermissionError(13, "Permission denied", "x"), 1, "Permission denied (x)"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "(x)"),
        (RuntimeError("[enforce fail] . No space left on device"), 1, "full"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "Out of GPU memory"),
        (MemoryError(), 1, "Out of memory"),
        (KeyboardInterrupt(), 130, "again"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 1, "halve[train]"),
        (ZeroDivisionError("division by zero"), 1, "--debug"),
    ],
)
def test_failures_are_explained(error: BaseException, code: int, word: str) -> None:
    failure = failures.explain(error)
    assert (failure.exit_code, "\n" in failure.message) == (code, False)
    assert word in failure.message


def test_a_file_that_ends_too_early_is_not_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr("pipeline.inspect_artefact.inspect", ended)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "."])
    assert stop.value.code == 2
    assert "ends before what it should hold" in capsys.readouterr().err


def test_output_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    place = tmp_path / "開始"
    place.mkdir()
    command = [sys.executable, "-m", "pipeline.cli", "clean", str(place)]
    found = environment() | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=found, check=False)
    assert done.returncode == 0, done.stderr
    assert "開始" in done.stdout.decode("utf8")


def test_closed_streams_change_no_exit_code(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m pipeline.cli inspect {tmp_path / 'nothing'} 2>&- <&-"
    done = subprocess.run(["sh", "-c", command], env=environment(), check=False)
    assert done.returncode == 2


def test_recipes_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "my"
    recipes = []
    for name in "ab":
        recipes.append(tmp_path / name / "my.yaml")
        recipes[-1].parent.mkdir()
        recipes[-1].touch()
    keep_apart(place, recipes[0], looks_only=True)
    assert not place.exists()
    for _ in range(2):
        keep_apart(place, recipes[0], looks_only=False)
    with pytest.raises(InputError, match=r"the run of another recipe, .*a/my\.yaml"):
        keep_apart(place, recipes[1], looks_only=True)
    recipes[0].unlink()  # it was renamed, or moved
    keep_apart(place, recipes[1], looks_only=False)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "nowhere", "--debug"])
    assert stop.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect_finds_damage(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tiny_corpus), "--json"])
    assert stop.value.code == 0
    assert '"verified": true' in capsys.readouterr().out
    import shutil

    damaged = shutil.copytree(tiny_corpus, tmp_path / "damaged")
    with open(damaged / "manifest.jsonl", "ab") as file:
        file.write(b"\n")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(damaged)])
    assert stop.value.code == 2
    assert "manifest.jsonl" in capsys.readouterr().err


def test_clean_and_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = tmp_path / "run" / ".importance.partial" / "work"
    left.mkdir(parents=True)
    (left / "ledger.jsonl").write_text("{}\n")
    for arguments in (["clean", str(tmp_path)], ["clean", str(tmp_path), "--yes"], ["doctor"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert not capsys.readouterr().err
        assert left.exists() == (arguments == ["clean", str(tmp_path)])
    assert (tmp_path / "run").exists()


def test_doctor_knows_the_build_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"onnxruntime-gpu": "1.31.1"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert (doctor._onnxruntime().state, doctor._onnxruntime().found) == ("yes", "1.31.1")
    there.clear()
    found = doctor._onnxruntime()
    assert (found.name, found.state) == ("onnxruntime", "no")


def test_clean_takes_leftovers_within_leftovers_and_follows_no_links(tmp_path: Path) -> None:
    outer = tmp_path / "run" / ".importance.partial"
    (outer / "work").mkdir(parents=True)
    (outer / ".inner.partial" / "work").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run" / ".tune.partial").symlink_to(elsewhere)
    with pytest.raises(SystemExit) as stop:
        main(["clean", str(tmp_path / "run"), "--yes"])
    assert stop.value.code == 0
    assert not outer.exists()
    assert elsewhere.exists()


def test_clean_leaves_what_other_programs_named_so(tmp_path: Path) -> None:
    for name in (".venv.old", ".data.partial"):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "lib" / "dear").touch()
    (tmp_path / ".student.old").mkdir()  # a kill came between its files and itself
    assert [one.path.name for one in find(tmp_path)] == [".student.old"]


def test_clean_leaves_a_run_that_is_under_way(tmp_path: Path) -> None:
    def removable(keep_unfinished: bool = False) -> list[str]:
        return [one.path.name for one in find(tmp_path, keep_unfinished)]

    for name, parents in (("pruned", {}), ("student", {"model": tmp_path / "pruned"})):
        with writing(tmp_path / name, "student", {}, 0, parents) as draft:
            (draft.path / "file").touch()
    assert removable() == ["pruned"]
    writer = "from halve.artefact import writing; from pathlib import Path; import time\n"
    writer += f"with writing(Path({str(tmp_path / 'adapter')!r}), 'adapter', {{}}, 0, {{}}):\n"
    writer += "    print('at work', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"at work\n"
        assert removable() == [], "it may read what lies beside it"
        process.kill()
    assert removable() == [".adapter.partial", "pruned"]
    assert removable(keep_unfinished=True) == [], "the stopped run goes on from both"
    shutil.rmtree(tmp_path / ".adapter.partial")
    assert removable(keep_unfinished=True) == [], "it has no report yet"
    for name in ("report", "adapter"):
        with writing(tmp_path / name, name, {}, 0, {}) as draft:
            (draft.path / "config.json").touch()
    assert removable(keep_unfinished=True) == ["pruned"], "the student is not of this adapter"
    parents = {"model": tmp_path / "pruned", "adapter": tmp_path / "adapter"}
    with writing(tmp_path / "student", "student", {"n": 2}, 0, parents) as draft:
        (draft.path / "file").touch()
    assert removable(keep_unfinished=True) == ["adapter", "pruned"]
    # Made anew for another student, which is not there yet: there is no other copy.
    with writing(tmp_path / "pruned", "student", {"n": 2}, 0, {}) as draft:
        (draft.path / "file").write_text("another")
    assert removable(keep_unfinished=True) == ["adapter"]


def test_translate_reads_the_organisers_layout(
    halve: Halve, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    yaml = tmp_path / "segments.yaml"
    entries = [("001.wav", 0.0, 0.3), ("000.wav", 0.2, 0.3), ("001.wav", 0.3, 0.3)]
    yaml.write_text("".join(f"- {{wav: {w}, offset: {o}, duration: {d}}}\n" for w, o, d in entries))
    (tmp_path / "FILE_ORDER").write_text("000\n001\n")
    arguments = ("--model", tiny_model, "--lang", "de", "--segments", yaml)
    done = halve("translate", *arguments, "--input-dir", tiny_corpus / "audio")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.removesuffix("\n").split("\n")
    done = halve("translate", *arguments, "--input-dir", tiny_corpus / "audio", "--json")
    found = json.loads(done.stdout)
    # Talks in FILE_ORDER's order, segments of a talk in the YAML's.
    assert [one["name"] for one in found] == [f"{yaml}:{line}" for line in (2, 1, 3)]
    assert [one["text"] for one in found] == lines
    done = halve("translate", *arguments, "--input-dir", tmp_path)
    assert done.returncode == 2
    assert "001.wav" in done.stderr
    assert "000.wav" in done.stderr


def test_segments_of_several_files_follow_their_order(tiny_corpus: Path, tmp_path: Path) -> None:
    """One YAML a talk: FILE_ORDER joins them, wherever it lies; without it there is no order."""
    audio = tiny_corpus / "audio"
    for talk, offsets in (("000", (0.0, 0.2)), ("001", (0.1,))):
        entries = (f"- {{wav: {talk}.wav, offset: {one}, duration: 0.2}}\n" for one in offsets)
        (tmp_path / f"{talk}.yaml").write_text("".join(entries))
    with pytest.raises(CorpusError, match="order of its talks"):
        pieces_of_segments(tmp_path, audio)
    (tmp_path / "FILE_ORDER").write_text("001\n000\n")
    found = pieces_of_segments(tmp_path, audio)
    assert [(each.path.name, each.offset_s) for each in found] == [
        ("001.wav", 0.1),
        ("000.wav", 0.0),
        ("000.wav", 0.2),
    ]
    (tmp_path / "FILE_ORDER").write_text("000\n002\n")
    with pytest.raises(CorpusError) as error:
        pieces_of_segments(tmp_path, audio)
    assert "001.wav is not in" in str(error.value) + "".join(error.value.faults)
    assert "no segment of 002" in str(error.value) + "".join(error.value.faults)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no segments YAML"):
        pieces_of_segments(tmp_path / "empty", audio)


def test_settings_name_every_fault() -> None:
    from compress.config import ImportanceConfig
    from halve.errors import RecipeError

    with pytest.raises(RecipeError) as error:
        settings_from(ImportanceConfig, {"remove": 0, "lang": "de", "segments": -1}, {})
    assert "--remove" in str(error.value)
    assert "--segments" in str(error.value)


def torn(path: Path) -> Path:
    """A FLAC file that begins well: only decoding it shows that it does not go on so."""
    soundfile.write(path, tiny.tone(2.0, 4), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff\x00" * 200)
    return path


def test_finished_lines_outlive_a_fault(halve: Halve, tiny_model: Path, tmp_path: Path) -> None:
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.wav")
        soundfile.write(files[-1], tiny.tone(1.0, number), 16_000)
    given = (
        "translate",
        "--model",
        tiny_model,
        "--lang",
        "de",
        *files[:2],
        torn(tmp_path / "t.flac"),
        files[2],
    )
    whole = halve(*given[:5], *files[:2])
    assert (whole.returncode, whole.stdout.count("\n")) == (0, 2)
    done = halve(*given)
    assert (done.returncode, done.stdout) == (2, whole.stdout)
    assert [line for line in done.stderr.splitlines() if "t.flac: not readable as audio" in line]
    listed = halve(*given, "--json")
    assert listed.returncode == 2
    assert [f"{one['text']}\n" for one in json.loads(listed.stdout)] == done.stdout.splitlines(True)


def test_lines_go_into_a_file_beside_bars_on_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tiny.tone(1.0, 1), 16_000)
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "pipeline.cli", "translate", "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, "--lang", "de", "a.wav"],
        cwd=tmp_path,
        env=environment() | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        check=True,
        timeout=300,
    )
    os.close(terminal)
    os.close(master)
    assert done.stdout.count("\n") == 1 and done.stdout.strip()


def test_wrong_usage_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["corpus", "x"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("Error: Missing option '--format'. Choose from: iwslt, acl6060")
    assert said.count("\n") == 1 and "\t" not in said


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_without_a_command_the_help_is_shown_as_it_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = "".join(capsys.readouterr())
    assert stop.value.code == 2
    assert "Usage: halve" in shown and "Error" not in shown and shown.count("\n") > 5


def test_one_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert speaks("tune"), "a rank alone makes no team"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not speaks("tune") and not speaks("teach") and speaks("translate")
    monkeypatch.setenv("RANK", "0")
    assert speaks("tune")
