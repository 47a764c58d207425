"""Artefacts are complete or absent, resumable, and honest about their files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from halve import artefact
from halve.errors import ArtefactError
from halve.json_files import append_jsonl, read_json, read_jsonl, write_json


class Died(Exception):
    """Stands for a kill: nothing after it runs."""


def _die(*args: object) -> None:
    raise Died


def make(out: Path, text: str = "hello", recipe: dict | None = None, parents: dict | None = None):
    with artefact.writing(out, "results", recipe or {"n": 1}, 0, parents or {}) as draft:
        (draft.path / "a.txt").write_text(text)
        (draft.work / "state").write_text("resume me")
        draft.extra["fact"] = 3
    return artefact.read(out, "results")


def test_a_written_artefact_reads_back_and_verifies(tmp_path: Path) -> None:
    made = make(tmp_path / "out")
    assert made.extra == {"fact": 3}
    assert set(made.files) == {"a.txt"}
    assert not (tmp_path / "out" / "work").exists()
    assert artefact.verify(tmp_path / "out") == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_repeated_run_has_the_same_record(tmp_path: Path) -> None:
    make(tmp_path / "one")
    make(tmp_path / "two")
    records = [(tmp_path / name / artefact.RECORD).read_bytes() for name in ("one", "two")]
    assert records[0] == records[1]
    assert (tmp_path / "one" / artefact.TIMINGS).is_file()


@pytest.mark.parametrize("damage", ["flip", "remove", "add", "grow"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    out = make(tmp_path / "out").path
    file = out / "a.txt"
    if damage == "flip":
        file.write_text("hellO")
    elif damage == "remove":
        file.unlink()
    elif damage == "add":
        file = out / "b.txt"
        file.write_text("x")
    else:
        file.write_text("hello!")
    faults = artefact.verify(out)
    assert len(faults) == 1
    assert file.name in faults[0]


def test_current_follows_recipe_seed_and_parents(tmp_path: Path) -> None:
    parent = make(tmp_path / "parent").path
    make(tmp_path / "out", parents={"model": parent})
    current = {"recipe": {"n": 1}, "seed": 0, "parents": {"model": parent}}
    assert artefact.is_current(tmp_path / "out", "results", **current)
    assert not artefact.is_current(tmp_path / "out", "results", **{**current, "recipe": {"n": 2}})
    assert not artefact.is_current(tmp_path / "out", "results", **{**current, "seed": 1})
    make(parent, text="other")
    assert not artefact.is_current(tmp_path / "out", "results", **current)


def test_what_newer_code_makes_otherwise_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    current = {"recipe": {"n": 1}, "seed": 0, "parents": {}}
    assert artefact.is_current(tmp_path / "out", "results", **current)
    monkeypatch.setattr(artefact, "REVISIONS", {"results": 2})
    assert not artefact.is_current(tmp_path / "out", "results", **current)


def test_who_begins_anew_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2):
        with (
            pytest.raises(ValueError),
            artefact.writing(tmp_path / "out", "results", {"n": number}, 0, {}) as draft,
        ):
            append_jsonl(draft.work / "done.jsonl", {"step": 1})
            raise ValueError
    assert ["it starts anew" in record.message for record in caplog.records] == [True]


def test_an_error_leaves_finished_work_and_nothing_else(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError),
        artefact.writing(tmp_path / "out", "results", {}, 0, {}) as draft,
    ):
        (draft.path / "half.txt").write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ValueError),
        artefact.writing(tmp_path / "out", "results", {}, 0, {}) as draft,
    ):
        append_jsonl(draft.work / "done.jsonl", {"step": 1})
        raise ValueError
    with artefact.writing(tmp_path / "out", "results", {}, 0, {}) as draft:
        assert draft.resumed
        assert read_jsonl(draft.work / "done.jsonl") == [{"step": 1}]
    with artefact.writing(tmp_path / "other", "results", {"changed": True}, 0, {}) as draft:
        assert not draft.resumed


def test_work_outlives_a_change_of_what_it_does_not_need(tmp_path: Path) -> None:
    scorer = tmp_path / "scorer"
    scorer.write_text("one")

    def begun(lang: str, resamples: int) -> bool:
        """Whether work was found; leaves some, and is stopped."""
        recipe = {"lang": lang, "resamples": resamples}
        place, parents = tmp_path / "out", {"scorer": scorer}
        with (
            pytest.raises(KeyboardInterrupt),
            artefact.writing(
                place, "results", recipe, resamples, parents, work_needs=({"lang"}, ())
            ) as draft,
        ):
            found = (draft.work / "done").exists()
            assert not (draft.path / "scores").exists() and draft.resumed == found
            (draft.work / "done").touch()
            (draft.path / "scores").touch()
            raise KeyboardInterrupt
        return found

    assert not begun("de", 10)
    assert begun("de", 20)
    scorer.write_text("another")
    assert begun("de", 20)
    assert not begun("zh", 20)


def test_what_is_in_the_way_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtefactError, match="in the way"):
        make(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with artefact.writing(tmp_path / "corpus", "corpus", {}, 0, {}):
        pass
    with pytest.raises(ArtefactError, match="in the way"):
        make(tmp_path / "corpus")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out").path
    record = json.loads((out / artefact.RECORD).read_text())
    (out / artefact.RECORD).write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(ArtefactError, match="newer halve"):
        artefact.read(out)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": "new"}', '{"kind": ', '"x"'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / artefact.RECORD).write_text(text)
    with pytest.raises(ArtefactError, match=r"artefact\.json.*(no record|not JSON)"):
        artefact.read(tmp_path)


def test_an_output_never_replaces_or_changes_its_input(tmp_path: Path) -> None:
    first = make(tmp_path / "first").path
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "alias").symlink_to(first)
    before = artefact.identity(first), artefact.identity(model)
    for out, why in (
        (first, "replace its own input"),
        (tmp_path / "alias", "replace its own input"),
        (first / "below" / "second", "inside"),
        (model / "second", "inside"),
    ):
        with pytest.raises(ArtefactError, match=why):
            make(out, text="other", parents={"first": first, "model": model})
    assert before == (artefact.identity(first), artefact.identity(model))
    assert artefact.verify(first) == []


def test_a_kill_while_writing_leaves_the_old_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"age": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _die)
        with pytest.raises(Died):
            write_json(path, {"age": 2})
    assert read_json(path) == {"age": 1}
    write_json(path, {"age": 3})
    assert read_json(path) == {"age": 3}
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_torn_line_is_dropped_and_mended(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    append_jsonl(file, {"n": 1})
    with open(file, "ab") as stream:
        stream.write(b'{"n": 2, "half')
    assert read_jsonl(file) == [{"n": 1}]
    append_jsonl(file, {"n": 3})
    assert read_jsonl(file) == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("call", ["rename", "unlink", "rmtree"])
def test_a_kill_while_publishing_loses_nothing(tmp_path: Path, call: str) -> None:
    """SIGKILL right before each step of publishing over an older artefact; the next run completes."""
    make(tmp_path / "out", text="old")
    program = textwrap.dedent(f"""
        import os, pathlib, shutil, signal
        from halve import artefact
        def die(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        with artefact.writing(pathlib.Path({str(tmp_path / "out")!r}), "results", {{"n": 2}}, 0, {{}}) as draft:
            (draft.path / "a.txt").write_text("new")
            if {call!r} == "rmtree":
                shutil.rmtree = die
            else:
                setattr(pathlib.Path, {call!r}, die)
    """)
    killed = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert artefact.is_current(tmp_path / "out", "results", {"n": 2}, 0, {})
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert artefact.verify(tmp_path / "out") == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_artefact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import sys\nfrom pathlib import Path\nfrom halve.artefact import writing\n"
        "with writing(Path(sys.argv[1]), 'corpus', {}, 0, {}) as draft:\n"
        "    (draft.work / 'done').write_text('x')\n    print('writing', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "writing\n"
    for recipe in ({}, {"another": 1}):
        with (
            pytest.raises(ArtefactError, match="by another process"),
            artefact.writing(out, "corpus", recipe, 0, {}),
        ):
            pass
    other.kill()
    other.communicate()
    with artefact.writing(out, "corpus", {}, 0, {}) as draft:
        assert draft.resumed
    assert artefact.read(out).kind == "corpus"


def test_who_looks_while_another_publishes_leaves_it_alone(tmp_path: Path) -> None:
    """A second run, or a dry one, comes by while the first one's files still go to a slow disk."""
    out = tmp_path / "out"
    script = """
        import sys, time
        from pathlib import Path
        from halve import artefact, partials
        sync = partials.sync
        def slowly(paths):
            print("publishing", flush=True)
            sys.stdin.readline()
            partials.sync = sync
            sync(paths)
        partials.sync = slowly
        with artefact.writing(Path(sys.argv[1]), "results", {"n": 1}, 0, {}) as draft:
            (draft.path / "a.txt").write_text("hello")
        print("published", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin and first.stdout
        assert first.stdout.readline() == "publishing\n"
        assert not artefact.is_current(out, "results", {"n": 1}, 0, {})
        with pytest.raises(ArtefactError, match="another process"):
            make(out)
        first.stdin.write("go\n")
        first.stdin.flush()
        assert first.stdout.readline() == "published\n"
    assert first.returncode == 0
    assert artefact.is_current(out, "results", {"n": 1}, 0, {})
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == [
        "a.txt", "artefact.json", "out", "timings.jsonl",
    ]  # fmt: skip


def test_a_record_torn_by_a_kill_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    undisturbed = make(tmp_path / "undisturbed")
    replace = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if Path(target).name == artefact.RECORD:
            os._exit(9)
        return replace(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "replace", dies)
        make(tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list((tmp_path / ".out.partial").glob(".*.new"))
    made = make(tmp_path / "out")
    assert artefact.verify(made.path) == [] and made.files == undisturbed.files


def test_what_a_downloader_keeps_beside_a_model_is_not_the_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    before = artefact.identity(model)
    (model / ".cache" / "huggingface" / "config.json.metadata").write_text("1764000000.0")
    (model / ".gitattributes").write_text("*.bin lfs")
    assert artefact.identity(model) == before
    (model / "vocab.json").write_text("{}")
    assert artefact.identity(model) != before


def test_what_somebody_put_into_an_artefact_is_not_deleted_with_it(tmp_path: Path) -> None:
    out = make(tmp_path / "out").path
    (out / "notes.txt").write_text("dear")
    with pytest.raises(ArtefactError, match=r"notes\.txt, which would be lost"):
        make(out, recipe={"n": 2})
    assert (out / "notes.txt").read_text() == "dear" and (out / "a.txt").is_file()
    (out / "notes.txt").unlink()
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("dear")
    with pytest.raises(ArtefactError, match=r"\.git/HEAD, which would be lost"):
        make(out, recipe={"n": 2})
    shutil.rmtree(out / ".git")
    (out / ".DS_Store").write_text("a file browser was here")
    assert make(out, "again", recipe={"n": 2}).recipe == {"n": 2}


def test_one_stage_may_make_another_kind_in_its_place(tmp_path: Path) -> None:
    out = make(tmp_path / "out", recipe={"method": "lora"}).path
    with artefact.writing(out, "student", {"method": "full"}, 0, {}) as draft:
        (draft.path / "b.txt").write_text("student")
    assert artefact.read(out, "student").files.keys() == {"b.txt"}
    with (
        pytest.raises(ArtefactError, match="in the way"),
        artefact.writing(out, "results", {"other": 1}, 0, {}),
    ):
        pass


def test_what_came_into_the_way_while_a_stage_ran_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(ArtefactError, match="in the way"),
        artefact.writing(out, "results", {"n": 1}, 0, {}) as draft,
    ):
        (draft.path / "a.txt").write_text("hello")
        out.mkdir()
        (out / "love.txt").write_text("dear")
    for look in (make, lambda out: artefact.is_current(out, "results", {"n": 1}, 0, {})):
        with pytest.raises(ArtefactError, match="in the way"):
            look(out)
        assert (out / "love.txt").read_text() == "dear"
    (out / "love.txt").rename(tmp_path / "love.txt")
    assert artefact.is_current(out, "results", {"n": 1}, 0, {}), "the finished work was kept"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "out")
    for number in (1, 2):
        make(tmp_path / "out", recipe={"n": number})
        assert (tmp_path / "out").is_symlink()
        assert artefact.is_current(tmp_path / "out", "results", {"n": number}, 0, {})
        assert [entry.name for entry in disk.iterdir()] == ["out"]


def test_where_nothing_can_be_renamed_to_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path, tmp_path.parent):
        with pytest.raises(ArtefactError, match="take the place of"):
            make(out)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mnt")
    (tmp_path / "mnt").mkdir()
    with pytest.raises(ArtefactError, match="a mount point"):
        make(tmp_path / "mnt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mnt"]


@pytest.mark.parametrize("damage", ["remove", "grow"])
def test_an_artefact_without_its_weights_is_not_up_to_date(tmp_path: Path, damage: str) -> None:
    out = make(tmp_path / "out").path
    if damage == "remove":
        (out / "a.txt").unlink()
    else:
        (out / "a.txt").write_text("hello hello")
    with pytest.raises(ArtefactError, match=r"a\.txt is .*remove .*out to have it made again"):
        artefact.is_current(out, "results", {"n": 1}, 0, {})


def test_an_output_inside_an_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "recordings"
    source.mkdir()
    (source / "a.txt").write_text("hello")
    with pytest.raises(ArtefactError, match="would lie inside"):
        make(source / "runs" / "out", parents={"source": source})
