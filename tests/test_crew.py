"""Threads are shared out among workers and given back."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halve import environment
from halve.crew import Crew

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "workers", "threads"), [(None, 4, 1), (9, 4, 1), (3, 3, 1), (2, 2, 2), (1, 1, 4)]
)
def test_workers_share_all_threads(most: int | None, workers: int, threads: int) -> None:
    with Crew(CPU, most) as crew:
        assert crew.size == workers
        assert crew.map(lambda _: torch.get_num_threads(), range(8)) == [threads] * 8
    assert torch.get_num_threads() == 4


def test_threads_are_given_back_after_a_fault() -> None:
    def work(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError), Crew(CPU) as crew:
        crew.map(work, [1, 0, 1])
    assert torch.get_num_threads() == 4


def test_other_devices_have_one_worker_and_their_threads() -> None:
    with Crew(torch.device("meta")) as crew:
        assert crew.size == 1
        assert crew.map(lambda item: (item, torch.get_num_threads()), "ab") == [("a", 4), ("b", 4)]


def test_work_has_no_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    with Crew(CPU) as crew:
        assert not any(found.requires_grad for found in crew.map(lambda _: 2 * weight, range(4)))
    assert (2 * weight).requires_grad


@pytest.mark.parametrize(
    ("told", "most"), [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("x", 64)]
)
def test_a_container_s_quota_of_processor_time_counts(
    told: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def fake(path: Path, *given: Any, **options: Any) -> str:
        if str(path).startswith("/sys/fs/cgroup/cpu"):
            if path.name != "cpu.max":
                raise FileNotFoundError(path)
            return told + "\n"
        return read(path, *given, **options)

    monkeypatch.setattr(Path, "read_text", fake)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert environment.cores() == most
