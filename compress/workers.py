"""Candidates on several processes or machines, through Ray.

Each worker loads the model itself and translates one group of candidates on one chunk of segments at a
time. It keeps nothing: what it found goes back to the search, whose ledger is the only store. A worker
that dies loses the group it had in hand, which is given to another one.

Ray is imported nowhere else.
"""

import copy
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from compress.footprint import Room
from compress.search import CandidatePool, Found, Work
from compress.task import SearchTask
from halve import artefact, environment
from halve.errors import HalveError, InputError, MissingExtraError
from halve.progress import SILENT, Progress

ATTEMPTS = 3
"""A group whose workers died so many times is not given to yet another one."""
DEATHS_PER_WORKER = 3
"""More deaths than this for each worker asked for, and the search stops."""
OBJECT_STORE_BYTES = 200_000_000
"""Room beside the audio for what Ray hands about."""
SAME_VERSIONS = ("halve", "torch", "transformers")
"""What must be alike everywhere, or the workers' tokens might not be."""


class WorkersDiedError(HalveError):
    """Workers died again and again on the same work."""


@dataclass(frozen=True)
class Setup:
    """What a worker must know to do as the others do."""

    model: str
    """The model's directory, at the same path on every machine."""
    files: dict[str, int]
    """Its files and their sizes in bytes, as the search sees them."""
    versions: dict[str, str]
    method: str
    dtype: str
    threads: int
    memory_gb: float | None
    """For all workers together."""
    share: float
    """Each worker's part of its device."""


@dataclass(frozen=True)
class Opened:
    """What a worker tells once its model is loaded."""

    pid: int
    node: str
    device: str
    room: Room
    together: int | None
    """Candidates that it decodes together, where it does."""


class Worker:
    """One process: a model in memory."""

    def __init__(self) -> None:
        self._translator: Any = None

    def open(self, setup: Setup, task: SearchTask) -> Opened:
        """Loads the model and encodes the segments.

        Raises:
            InputError: other versions here, or the model is not here or another one.
        """
        from compress.importance import budget_bytes, room_for
        from compress.search import translator_for
        from halve.models import load_model

        node = os.uname().nodename
        _check_versions(setup, node)
        _check_model(setup, node)
        environment.pin_threads(min(setup.threads, environment.cores()))
        speech = load_model(setup.model, dtype=setup.dtype)
        # What Ray hands over is read-only.
        task = replace(task, audio=tuple(copy.deepcopy(source) for source in task.audio))
        self._translator = translator_for(setup.method, speech, task)
        models = round(1 / setup.share)  # each worker on a GPU holds one
        budget = int(setup.share * budget_bytes(setup.memory_gb, speech, models))
        room = room_for(self._translator, budget)
        together = getattr(self._translator, "together", None)
        return Opened(os.getpid(), node, speech.device, room, together)

    def groups(
        self, candidates: Sequence[int | None], together: int | None
    ) -> list[list[int | None]]:
        """The candidates in groups that are worked on together, of at most so many where they are decoded together."""
        if together is not None:
            self._translator.together = together
        found: list[list[int | None]] = self._translator.groups(candidates)
        return found

    def translate(self, work: Work) -> list[tuple[int | None, list[list[int]]]]:
        """Carries out the one group of `work`."""
        with self._translator:
            (found,) = self._translator.run(work.kept, work.drafts, work.groups, work.rows)
        return list(found.items())


def _check_versions(setup: Setup, node: str) -> None:
    here = environment.versions()
    for name, wanted in setup.versions.items():
        if here.get(name) != wanted:
            raise InputError(
                f"The worker on {node} has {name} {here.get(name, 'not installed')}",
                expected=f"{wanted}, as the search has: else its translations could differ",
                mend="install the same versions on every machine of the cluster",
            )


def _check_model(setup: Setup, node: str) -> None:
    path = Path(setup.model)
    if not (path / "config.json").is_file():
        raise InputError(
            f"The worker on {node} does not see the model at {path}",
            expected="the model at the same path on every machine of the cluster",
            mend="copy it there or use a shared file system",
        )
    if model_files(path) != setup.files:
        raise InputError(
            f"The worker on {node} has another model at {path}",
            expected="the same files, of the same sizes, on every machine of the cluster",
            mend="copy the model there again",
        )


def model_files(path: Path) -> dict[str, int]:
    """The files of a model directory and their sizes in bytes."""
    return {
        file.name: file.stat().st_size
        for file in sorted(path.iterdir())
        if file.is_file() and file.name != artefact.TIMINGS
    }


def _no_text(tokens: Sequence[int]) -> str:
    raise NotImplementedError("workers translate; the search scores")


@dataclass
class _Errand:
    """One group on one chunk, and how often its worker died."""

    work: Work
    deaths: int = 0


class RayWorkers(CandidatePool):
    """Candidates on Ray workers. Open it as a context: it starts the workers and ends them.

    Every machine needs halve, the model at the same path, and nothing else. Threads and memory of a
    machine of its own are divided by the number of workers; of a cluster, its cores and GPUs.
    """

    def __init__(
        self,
        model: Path,
        task: SearchTask,
        *,
        method: str = "exact",
        dtype: str = "float32",
        workers: int = 2,
        address: str | None = None,
        memory_gb: float | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """`address` is that of an existing cluster, as Ray knows it; without it one is started here.

        Raises:
            MissingExtraError: ray is not installed.
        """
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray") from None
        self._ray: Any = ray
        self._task = replace(task, decode=_no_text)
        self._workers = workers
        self._address = address
        self._progress = progress
        self._setup = Setup(
            model=str(model.resolve()),
            files=model_files(model),
            versions={name: environment.versions().get(name, "") for name in SAME_VERSIONS},
            method=method,
            dtype=dtype,
            threads=1,
            memory_gb=memory_gb,
            share=1 / workers,
        )
        self._options: dict[str, Any] = {}
        self._shared: tuple[Any, Any] | None = None
        """The setup and the segments, in Ray's store."""
        self._opening: dict[Any, Any] = {}
        """Workers that are loading the model, by what will say so."""
        self._busy: dict[Any, tuple[Any, _Errand]] = {}
        self._idle: deque[Any] = deque()
        self._opened: list[Opened] = []
        self._deaths = 0

    def __enter__(self) -> "RayWorkers":
        self._connect()
        try:
            self._divide()
            for _ in range(self._workers):
                self._start()
            while self._opening:
                self._settle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        places = sorted({f"{one.node} ({one.device})" for one in self._opened})
        threads = self._setup.threads
        self._progress.message(
            f"{len(self._opened)} workers of {threads} thread(s) each on {', '.join(places)}"
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        busy = [worker for worker, _ in self._busy.values()]
        for worker in [*busy, *self._opening.values(), *self._idle]:
            self._ray.kill(worker)
        self._busy, self._opening, self._idle = {}, {}, deque()
        self._ray.shutdown()

    # Starting

    def _connect(self) -> None:
        """A Ray of this process's own, or the cluster at the address."""
        # The project sends nothing about its users anywhere.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        try:
            if self._address is not None:
                self._ray.init(address=self._address, **quiet)
                return
            audio_bytes = sum(len(pickle.dumps(source)) for source in self._task.audio)
            self._ray.init(
                address="local",
                num_cpus=max(environment.cores(), self._workers),
                object_store_memory=OBJECT_STORE_BYTES + 2 * audio_bytes,
                include_dashboard=False,
                **quiet,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"No Ray at {self._address or 'this machine'} ({_first_line(error)})",
                expected="the address of a running cluster, such as 10.0.0.1:6379 or auto",
                mend="start one with `ray start --head`, or leave --ray-address out",
            ) from None

    def _divide(self) -> None:
        """Gives each worker its part of the cores and GPUs."""
        resources = self._ray.cluster_resources()
        cores = int(resources.get("CPU", 0))
        if self._workers > cores:
            raise InputError(
                f"{self._workers} workers on a cluster of {cores} cores",
                expected="at least one core a worker",
                mend="ask for fewer --workers",
            )
        own = environment.cores() if self._address is None else cores
        gpus = int(resources.get("GPU", 0))
        # Ray keeps a worker on one GPU: as many on each as the fullest one must take.
        on_one = -(-self._workers // gpus) if gpus else 0
        self._setup = replace(self._setup, threads=max(1, own // self._workers))
        if on_one and self._setup.memory_gb is None:
            self._setup = replace(self._setup, share=1 / on_one)
        self._options = {
            "num_cpus": 1,
            "num_gpus": int(1000 / on_one) / 1000 if on_one else 0,
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }
        self._shared = (self._ray.put(self._setup), self._ray.put(self._task))

    def _start(self) -> None:
        assert self._shared is not None
        worker = self._ray.remote(Worker).options(**self._options).remote()
        self._opening[worker.open.remote(*self._shared)] = worker

    # Working

    def rooms(self) -> list[Room]:
        """The workers' rooms: what all of them work on must fit into each."""
        return list({one.room for one in self._opened})

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """See CandidatePool."""
        # What the one with the least room can hold, whoever is asked.
        sizes = [one.together for one in self._opened if one.together is not None]
        least = min(sizes, default=None)
        found: list[list[int | None]] = self._ask(
            lambda worker: worker.groups.remote(candidates, least)
        )
        return found

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer of any worker that is free."""
        while True:
            while not self._idle:
                self._settle()
            worker = self._idle[0]
            try:
                return self._get(question(worker))
            except _dying(self._ray) as error:
                self._idle.popleft()
                self._bury(worker, error)

    def run_all(self, works: Sequence[Work]) -> Iterator[tuple[int, Found]]:
        """See CandidatePool.

        Raises:
            WorkersDiedError: a group's workers died again and again.
        """
        waiting = deque(
            _Errand(replace(work, groups=[group])) for work in works for group in work.groups
        )
        while waiting or self._busy:
            while waiting and self._idle:
                worker, errand = self._idle.popleft(), waiting.popleft()
                self._busy[worker.translate.remote(errand.work)] = (worker, errand)
            done = self._settle()
            if isinstance(done, _Errand):
                waiting.appendleft(done)
            elif done is not None:
                yield done

    def _settle(self) -> tuple[int, Found] | _Errand | None:
        """Waits until a worker has something to say.

        Returns:
            what was found on a chunk; a group that was lost with its worker; None where a worker has
            opened, or died without work.
        """
        (ready,), _ = self._ray.wait([*self._busy, *self._opening], num_returns=1)
        opening = self._opening.pop(ready, None)
        try:
            answer = self._get(ready)
        except _dying(self._ray) as error:
            worker, errand = self._busy.pop(ready, (opening, None))
            self._bury(worker, error, errand)
            return errand
        if opening is not None:
            self._opened.append(answer)
            self._idle.append(opening)
            return None
        worker, errand = self._busy.pop(ready)
        self._idle.append(worker)
        return errand.work.chunk, dict(answer)

    def _get(self, answer: Any) -> Any:
        """A worker's answer, or what it raised."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if error.cause is not None:
                raise error.cause from error
            raise

    def _bury(self, worker: Any, error: Exception, errand: _Errand | None = None) -> None:
        """A worker is dead or out of reach: notes it, and starts another one.

        Raises:
            WorkersDiedError: too many have died.
        """
        self._deaths += 1
        self._ray.kill(worker)  # one that is only out of reach must not go on
        lost = "before it had work"
        if errand is not None:
            errand.deaths += 1
            layers = ", ".join("none" if one is None else str(one) for one in errand.work.groups[0])
            lost = f"while it left out layers {layers}"
        often = errand is not None and errand.deaths >= ATTEMPTS
        if often or self._deaths > DEATHS_PER_WORKER * self._workers:
            raise WorkersDiedError(
                f"{self._deaths} workers died, the last {lost} ({_first_line(error)})",
                expected="workers that live: short of memory, the system kills them",
                mend="run the same command with fewer --workers: finished candidates are kept; "
                "or begin anew with a smaller --memory-gb",
            )
        self._progress.warn(f"A worker died {lost}; that work is done again by another.")
        self._start()


def _dying(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises where a process or its machine is gone."""
    kinds = ray.exceptions
    return (
        kinds.RayActorError,
        kinds.WorkerCrashedError,
        kinds.NodeDiedError,
        kinds.OutOfMemoryError,
        kinds.ObjectLostError,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
