"""Work done ahead: in order, bounded, with its errors where they belong."""

import threading

import pytest

from export.ahead import working_ahead


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_items_come_in_order(threads: int) -> None:
    with working_ahead(lambda item: item * item, range(50), threads) as queue:
        found = []
        while queue:
            found.append(queue.take())
    assert found == [(item, item * item) for item in range(50)]


def test_no_more_is_begun_than_a_few_items() -> None:
    begun = []
    with working_ahead(begun.append, range(100), 2) as queue:
        for _ in range(3):
            queue.take()
    assert len(begun) <= 3 + 4
    with working_ahead(begun.append, range(100), 1) as queue:
        before = len(begun)
        queue.take()
        assert len(begun) == before + 1


def test_an_error_is_raised_by_its_own_item() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("2")
        return item

    with working_ahead(work, range(4), 2) as queue:
        assert [queue.take()[1], queue.take()[1]] == [0, 1]
        with pytest.raises(ValueError, match="2"):
            queue.take()
        assert queue.take() == (3, 3)


def test_the_caller_works_while_items_are_made() -> None:
    arrived, go = threading.Event(), threading.Event()

    def work(item: int) -> int:
        arrived.set()
        assert go.wait(10)
        return item

    with working_ahead(work, range(2), 2) as queue:
        assert arrived.wait(10), "nothing is worked on before it is asked for"
        go.set()
        assert queue.take() == (0, 0)
