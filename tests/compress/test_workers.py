"""The search on Ray workers finds what it finds alone, whatever happens to a worker."""

import builtins
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from compress import workers
from compress.config import ImportanceConfig
from compress.footprint import checked
from compress.importance import run_importance
from compress.search import Ledger, translator_for
from halve import environment
from halve.errors import InputError, MissingExtraError
from halve.progress import Progress
from tests.compress.search_models import opened

SEARCH = {"remove": 2, "lang": "de", "segments": 4, "batch_size": 2}


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps = 0

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def worker_processes() -> list[Any]:
    """This process's Ray workers, once they have one of ours each."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name().startswith("ray::Worker") or "ray::Worker" in child.cmdline()[0]:
                found.append(child)
        except (psutil.Error, IndexError):
            continue
    return found


class Killer(threading.Thread):
    """Stops a worker before it can answer, and kills it once the other one has."""

    def __init__(self, ready: Callable[[], bool], lines: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self._ready, self._lines = ready, lines
        self.killed: int | None = None

    def run(self) -> None:
        while not self._ready():
            time.sleep(0.01)
        victim = worker_processes()[0]
        victim.send_signal(signal.SIGSTOP)
        before = self._lines()
        deadline = time.monotonic() + 60
        # At most one piece can be on its way back from the other worker.
        while self._lines() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        victim.kill()
        self.killed = victim.pid


def test_a_killed_worker_changes_nothing(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs halve[ray]")
    threads = environment.threads()
    environment.pin_threads(1)
    added: list[tuple[int, int, Any]] = []
    add = Ledger.add

    def counted(self: Ledger, number: int, chunk: int, found: Any) -> None:
        added.extend((number, chunk, layer) for layer in found)
        add(self, number, chunk, found)

    monkeypatch.setattr(Ledger, "add", counted)
    monkeypatch.setattr(environment, "cores", lambda: 2)
    is_open = threading.Event()
    run_all = workers.RayWorkers.run_all

    def noted(self: Any, works: Any) -> Any:
        is_open.set()
        yield from run_all(self, works)

    monkeypatch.setattr(workers.RayWorkers, "run_all", noted)
    try:
        run_importance(ImportanceConfig(**SEARCH), tiny_model, tiny_corpus, tmp_path / "alone")
        alone, told = list(added), Told()
        added.clear()
        killer = Killer(is_open.is_set, lambda: len(added))
        killer.start()
        config = ImportanceConfig(**SEARCH, workers=2)
        run_importance(config, tiny_model, tiny_corpus, tmp_path / "two", told)
    finally:
        environment.pin_threads(threads)
    assert killer.killed is not None
    assert [warning for warning in told.warnings if "died while" in warning]
    assert sorted(added, key=str) == sorted(alone, key=str), "each piece is found once"
    for name in ("importance.jsonl", "plan.json", "artefact.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert not worker_processes()


class FakeRay:
    """As much of Ray as the pool asks for, in this process; workers die when told."""

    class exceptions:
        class RayTaskError(Exception):
            cause: Exception | None = None

        class RayActorError(Exception):
            pass

        WorkerCrashedError = NodeDiedError = OutOfMemoryError = ObjectLostError = RayActorError

    def __init__(self, cores: int = 4, gpus: int = 0) -> None:
        self.cores, self.gpus = cores, gpus
        self.answers: dict[int, Callable[[], Any]] = {}
        self.dies: Callable[[workers.Work], bool] = lambda work: False
        self.started = self.asked = self.stopped = 0

    def init(self, **options: Any) -> None:
        if options.get("address") == "nowhere:1":
            raise ConnectionError("nobody answers\nat all")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cores), **({"GPU": float(self.gpus)} if self.gpus else {})}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, kind: type) -> Any:
        return FakeActor(self, kind)

    def wait(self, refs: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        return [refs[-1]], refs[:-1]

    def get(self, ref: int) -> Any:
        try:
            return self.answers.pop(ref)()
        except InputError as error:
            wrapped = self.exceptions.RayTaskError()
            wrapped.cause = error
            raise wrapped from None

    def kill(self, worker: Any) -> None:
        self.stopped += 1

    def shutdown(self) -> None:
        pass


class FakeActor:
    """A worker of FakeRay."""

    def __init__(self, ray: FakeRay, kind: type) -> None:
        self._ray, self._worker = ray, kind()

    def options(self, **options: Any) -> "FakeActor":
        return self

    def remote(self) -> "FakeActor":
        self._ray.started += 1
        return self

    def __getattr__(self, name: str) -> Any:
        def later(*arguments: Any) -> int:
            self._ray.asked += 1

            def answer() -> Any:
                if name == "translate" and self._ray.dies(arguments[0]):
                    raise self._ray.exceptions.RayActorError("killed")
                return getattr(self._worker, name)(*arguments)

            self._ray.answers[self._ray.asked] = answer
            return self._ray.asked

        return type("Method", (), {"remote": staticmethod(later)})


def pool(speech: Any, task: Any, fake: FakeRay, **options: Any) -> workers.RayWorkers:
    """A pool on the fake."""
    with mock.patch.dict(sys.modules, ray=fake):
        return workers.RayWorkers(speech.path, task, **options)


def test_lost_groups_are_given_to_another_and_not_for_ever(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    speech, task = opened(tmp_path, tiny_corpus, segments=2, most=6)
    speech.model.save_pretrained(speech.path)  # as `opened` changed it
    rows, layers = [0, 1], list(range(6))
    drafts: list[list[int]] = [[], []]
    with translator_for("exact", speech, task) as translator:
        groups = translator.groups([None, 1, 2, 3, 4])
        wanted = {
            layer: tokens
            for found in translator.run(layers, drafts, groups, rows)
            for layer, tokens in found.items()
        }
    work = workers.Work(0, rows, layers, drafts, groups)
    fake, deaths = FakeRay(), []

    def once(errand: workers.Work) -> bool:
        deaths.append(errand.groups)
        return deaths.count(errand.groups) == 1

    fake.dies = once
    with pool(speech, task, fake) as two:
        assert two.groups([None, 1, 2, 3, 4]) == groups
        assert len(two.rooms()) == 1, "workers that are alike have one"
        found = {layer: tokens for _, one in two.run_all([work]) for layer, tokens in one.items()}
    assert found == wanted
    assert fake.started == 2 + len(groups), "each death brings a new worker"
    fake.dies = lambda errand: 1 in errand.groups[0]
    with (
        pytest.raises(workers.WorkersDiedError, match="left out layers 1"),
        pool(speech, task, fake) as two,
    ):
        list(two.run_all([work]))


@pytest.mark.parametrize(
    ("asked", "gpus", "each", "share"),
    [(2, 0, 0, 1 / 2), (2, 4, 1, 1), (3, 2, 0.5, 1 / 2), (6, 4, 0.5, 1 / 2), (8, 1, 0.125, 1 / 8)],
)
def test_no_worker_waits_for_a_gpu_that_is_never_free(
    tiny_corpus: Path, tmp_path: Path, asked: int, gpus: int, each: float, share: float
) -> None:
    """Ray keeps a worker on one GPU: two thirds of one leave no room for another."""
    speech, task = opened(tmp_path, tiny_corpus, segments=2)
    several = pool(speech, task, FakeRay(8, gpus), workers=asked)
    several._divide()
    assert several._options["num_gpus"] == each
    assert several._setup.share == share


def test_refusals(tiny_corpus: Path, tmp_path: Path) -> None:
    speech, task = opened(tmp_path, tiny_corpus, segments=2)
    with pytest.raises(InputError, match=r"8 workers on a cluster of 4 cores"):
        pool(speech, task, FakeRay(), workers=8).__enter__()
    with pytest.raises(InputError, match=r"No Ray at nowhere:1 \(nobody answers\)"):
        pool(speech, task, FakeRay(), address="nowhere:1").__enter__()
    with pytest.raises(InputError, match="same path on every machine"):
        changed = pool(speech, task, FakeRay())
        changed._setup = replace(changed._setup, model="/not/there")
        changed.__enter__()
    with pytest.raises(InputError, match="another model"):
        changed = pool(speech, task, FakeRay())
        changed._setup = replace(changed._setup, files={"config.json": 1})
        changed.__enter__()
    with pytest.raises(InputError, match="has torch"):
        changed = pool(speech, task, FakeRay())
        changed._setup = replace(changed._setup, versions={"torch": "0.1"})
        changed.__enter__()


def test_without_ray(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"halve\[ray\]"):
        run_importance(
            ImportanceConfig(**SEARCH, workers=2), tiny_model, tiny_corpus, tmp_path / "out"
        )


def test_workers_with_little_room_decode_fewer_candidates_together(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    speech, task = opened(tmp_path, tiny_corpus, segments=2, most=6)
    speech.model.save_pretrained(speech.path)
    with translator_for("exact", speech, task) as translator:
        translator.together = 2
        budget = translator._most_alone()
        groups = translator.groups([None, 1, 2, 3, 4])
    with pool(speech, task, FakeRay(), workers=2, memory_gb=2 * budget / 1e9) as two:
        assert {room.budget for room in two.rooms()} <= {budget, budget - 1}
        checked(two.rooms(), task.ids)
        found = two.groups([None, 1, 2, 3, 4])
    # Rounding may leave a byte less than two of them need.
    assert found == groups or max(map(len, found)) == 1
