"""What the engine promises: batches, fairness, and no work for those who left."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from halve.errors import ArtefactError
from halve.models import load_model
from halve.translate import TorchTranslator
from serve.engine import Engine
from serve.errors import ApiError
from serve.pieces import LATEST_DUE_S, Piece, Ticket, Watcher
from serve.runners import BatchRunner
from tests.serve.conftest import eventually
from tests.serve.fakes import FakeBatch, FakeRow, FakeTranslator, SteppingTranslator

WAIT_S = 60


def piece(seconds: float, ticket: Ticket | None = None, lang: str = "de", **options) -> Piece:
    samples = np.zeros(int(seconds * 16_000), np.float32)
    return Piece(ticket or Ticket(), samples, seconds, lang, **options)


@pytest.fixture
def stepping() -> SteppingTranslator:
    return SteppingTranslator()


@pytest.fixture
def engine(fake: FakeTranslator):
    engine = Engine("fake", lambda: fake, batch_size=4)
    yield engine
    fake.gate.set()
    assert engine.close(WAIT_S)
    assert fake.closed


@pytest.fixture
def stepping_engine(stepping: SteppingTranslator):
    engine = Engine("stepping", lambda: stepping, batch_size=2)
    yield engine
    stepping.gate.set()
    assert engine.close(WAIT_S)


def held(engine: Engine, fake: FakeTranslator) -> Piece:
    """A piece that is being translated until the gate opens."""
    fake.gate.clear()
    first = piece(1)
    engine.submit(first)
    assert fake.entered.wait(WAIT_S)
    return first


def test_what_waits_is_translated_together(engine: Engine, fake: FakeTranslator) -> None:
    held(engine, fake)
    others = [piece(1 + index / 10) for index in range(5)]
    for other in others:
        engine.submit(other)
    fake.gate.set()
    texts = [other.future.result(WAIT_S).translation.text for other in others]
    assert texts == [f"de {1 + index / 10:.2f}" for index in range(5)]
    assert fake.batches == [[1.0], [1.0, 1.1, 1.2, 1.3], [1.4]]


@pytest.mark.parametrize("late_s", [0, 600])  # the second should have been done long ago
def test_a_short_request_overtakes_the_rest_of_a_long_one(
    late_s: int, engine: Engine, fake: FakeTranslator
) -> None:
    first = held(engine, fake)
    long = Ticket(first.ticket.arrival_s - late_s)
    for _ in range(4):
        engine.submit(piece(30, long))
    short = piece(2)
    engine.submit(short)
    fake.gate.set()
    short.future.result(WAIT_S)
    assert fake.batches[1] == [2.0]


def test_a_long_request_is_not_overtaken_for_ever(engine: Engine, fake: FakeTranslator) -> None:
    first = held(engine, fake)
    old = piece(30, Ticket(first.ticket.arrival_s - 60))
    engine.submit(old)
    old.due_s -= 60  # it came with its request
    for _ in range(6):
        engine.submit(piece(2))
    fake.gate.set()
    eventually(lambda: len(fake.batches) > 1)
    assert fake.batches[1][0] == 30.0


def test_the_end_of_an_hour_is_due_in_its_time(engine: Engine, fake: FakeTranslator) -> None:
    first = held(engine, fake)
    hour = Ticket(first.ticket.arrival_s - LATEST_DUE_S)
    hour.audio_s = 3570.0  # of which all but the last stretch went in before
    last = piece(30, hour)
    engine.submit(last)
    assert last.due_s <= first.due_s + 30
    fake.gate.set()


def test_languages_are_not_mixed(engine: Engine, fake: FakeTranslator) -> None:
    held(engine, fake)
    german, chinese = piece(1), piece(1, lang="zh")
    engine.submit(german)
    engine.submit(chinese)
    fake.gate.set()
    assert german.future.result(WAIT_S).translation.text == "de 1.00"
    assert chinese.future.result(WAIT_S).translation.text == "zh 1.00"


def test_cancelled_pieces_are_never_translated(engine: Engine, fake: FakeTranslator) -> None:
    held(engine, fake)
    gone, kept = piece(5), piece(6)
    engine.submit(gone)
    engine.submit(kept)
    gone.ticket.cancelled = True
    fake.gate.set()
    kept.future.result(WAIT_S)
    with pytest.raises(CancelledError):
        gone.future.result(WAIT_S)
    assert all(5.0 not in batch for batch in fake.batches)


def test_one_bad_piece_fails_alone(engine: Engine, fake: FakeTranslator) -> None:
    held(engine, fake)
    fake.fail_at_s = 3.0
    bad, good = piece(3), piece(2)
    engine.submit(bad)
    engine.submit(good)
    fake.gate.set()
    assert good.future.result(WAIT_S).translation.text == "de 2.00"
    with pytest.raises(ApiError) as caught:
        bad.future.result(WAIT_S)
    assert "/secret" not in caught.value.message


def test_text_appears_while_nobody_else_waits(engine: Engine) -> None:
    texts: list[str] = []
    alone = piece(1, on_text=texts.append)
    engine.submit(alone)
    assert alone.future.result(WAIT_S).translation.tokens == [1, 2, 3]
    assert len(texts) > 1
    assert "".join(texts) == "de 1.00"


def test_a_stream_whose_client_leaves_ends(engine: Engine, fake: FakeTranslator) -> None:
    fake.gate.clear()
    leaving = piece(1, on_text=lambda text: None)
    engine.submit(leaving)
    assert fake.entered.wait(WAIT_S)
    leaving.ticket.cancelled = True
    fake.gate.set()
    with pytest.raises(ApiError):
        leaving.future.result(WAIT_S)


def test_closing_fails_what_waits(fake: FakeTranslator) -> None:
    engine = Engine("fake", lambda: fake)
    first = held(engine, fake)
    waiting, late = piece(1), piece(1)
    engine.submit(waiting)
    closer = threading.Thread(target=engine.close, args=(WAIT_S,))
    closer.start()
    eventually(lambda: engine._closing)
    engine.submit(late)
    fake.gate.set()
    closer.join(WAIT_S)
    assert first.future.result(WAIT_S).translation.text == "de 1.00"
    for refused in (waiting, late):
        with pytest.raises(ApiError) as caught:
            refused.future.result(WAIT_S)
        assert caught.value.status == 503


class Queue(Watcher):
    def queued(self, model: str, pieces: int) -> None:
        self.pieces = pieces


def test_what_is_dropped_waits_no_more(fake: FakeTranslator) -> None:
    queue = Queue()
    engine = Engine("fake", lambda: fake, watcher=queue)
    held(engine, fake)
    waiting = piece(1)
    engine.submit(waiting)
    closer = threading.Thread(target=engine.close, args=(WAIT_S,))
    closer.start()
    eventually(lambda: engine._closing)
    assert queue.pieces == 1
    fake.gate.set()
    closer.join(WAIT_S)
    assert queue.pieces == 0 and not engine.is_alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_ended(
    fake: FakeTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it: here something that no failed translation raises."""
    engine = Engine("fake", lambda: fake)
    engine.ready.result(WAIT_S)
    assert engine.is_alive

    def end(*_: object, **__: object) -> None:
        raise SystemExit

    monkeypatch.setattr(fake, "translate", end)
    lost = piece(1)
    engine.submit(lost)
    with pytest.raises(ApiError) as caught:
        lost.future.result(WAIT_S)
    assert caught.value.status == 503
    assert engine.close(WAIT_S) and not engine.is_alive and fake.closed


def test_a_model_that_cannot_be_opened_says_so() -> None:
    def broken() -> FakeTranslator:
        raise ArtefactError("it is damaged")

    engine = Engine("broken", broken)
    with pytest.raises(ArtefactError, match="damaged"):
        engine.ready.result(WAIT_S)
    late = piece(1)
    engine.submit(late)
    with pytest.raises(ApiError):
        late.future.result(WAIT_S)


def test_rows_join_and_leave(stepping_engine: Engine, stepping: SteppingTranslator) -> None:
    stepping.gate.clear()
    long, short, third = piece(29), piece(2), piece(3)
    stepping_engine.submit(long)
    assert stepping.entered.wait(WAIT_S)
    stepping_engine.submit(short)
    stepping_engine.submit(third)
    stepping.gate.set()
    assert long.future.result(WAIT_S).translation.tokens == list(range(30))
    assert short.future.result(WAIT_S).translation.text == "0 1 2"
    assert third.future.result(WAIT_S).translation.text == "0 1 2 3"
    # The short row left before the long one ended, and the third took its place.
    assert [29.0, 2.0] in stepping.batches
    assert [29.0, 3.0] in stepping.batches


def test_a_cancelled_row_leaves_at_the_next_step(
    stepping_engine: Engine, stepping: SteppingTranslator
) -> None:
    stepping.gate.clear()
    leaving = piece(29)
    stepping_engine.submit(leaving)
    assert stepping.entered.wait(WAIT_S)
    leaving.ticket.cancelled = True
    stepping.gate.set()
    with pytest.raises(ApiError):
        leaving.future.result(WAIT_S)
    assert len(stepping.batches) <= 2
    assert not stepping.batch.rows


def test_a_checkpoint_s_row_leaves_when_its_client_does(tiny_model: Path) -> None:
    translator = TorchTranslator(load_model(tiny_model))
    leaving, kept = piece(1), piece(1, limit=20)
    steps = []
    choose = translator.choose

    def watched(hidden, first):
        steps.append(len(hidden))
        leaving.ticket.cancelled = len(steps) == 3 or leaving.ticket.cancelled
        return choose(hidden, first)

    translator.choose = watched
    runner = BatchRunner(translator, 2)
    runner.add(leaving)
    runner.add(kept)
    left = {finished.piece: finished for finished in runner.step(crowded=False)}
    assert steps == [2, 2, 2] + [1] * (len(steps) - 3) and len(steps) == 20
    assert isinstance(left[leaving].error, ApiError) and left[leaving].translation is None
    alone = translator.translate([kept.samples], "de", limits=[20])[0]
    assert left[kept].translation == alone


def test_stepping_streams_and_survives_failures(stepping_engine: Engine) -> None:
    texts: list[str] = []
    bad, watched = piece(3, lang="zh"), piece(3, on_text=texts.append)
    stepping_engine.submit(bad)
    stepping_engine.submit(watched)
    assert watched.future.result(WAIT_S).translation.text == "".join(texts) == "0 1 2 3"
    assert len(texts) > 1
    with pytest.raises(ApiError):
        bad.future.result(WAIT_S)


class BreakingBatch(FakeBatch):
    """Rows under a second end as they join, and the step after that fails."""

    broken = False
    removes = True

    def remove(self, row: FakeRow) -> None:
        super().remove(row)
        if not self.removes:
            raise MemoryError("no room for the copy")

    def add(self, inputs: np.ndarray, limit: int) -> FakeRow:
        row = super().add(inputs, limit)
        if row.limit == 0:
            row.stopped, self.broken = "end", True
            self.rows.remove(row)
        return row

    def step(self) -> list[FakeRow]:
        self.owner.entered.set()
        assert self.owner.gate.wait(60)
        if self.broken:
            self.broken = False
            raise MemoryError("no room for the step")
        return []


def test_what_is_done_is_not_lost_when_the_next_step_fails(
    stepping: SteppingTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "open_batch", lambda slots: BreakingBatch(slots, stepping))
    engine = Engine("breaking", lambda: stepping, batch_size=2)
    running = held(engine, stepping)
    done = piece(0.5)
    engine.submit(done)
    stepping.gate.set()
    assert done.future.result(WAIT_S).translation.tokens == [0]
    with pytest.raises(ApiError) as caught:
        running.future.result(WAIT_S)
    assert caught.value.status == 500
    # The engine goes on.
    last = piece(0.5)
    engine.submit(last)
    assert last.future.result(WAIT_S).translation.tokens == [0]
    assert engine.close(WAIT_S)


def test_the_engine_outlives_rows_that_cannot_be_removed(
    stepping: SteppingTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BreakingBatch, "removes", False)
    monkeypatch.setattr(stepping, "open_batch", lambda slots: BreakingBatch(slots, stepping))
    engine = Engine("breaking", lambda: stepping, batch_size=3)
    first = held(engine, stepping)
    second, done = piece(2), piece(0.5)
    engine.submit(second)
    engine.submit(done)
    stepping.gate.set()
    for lost in (first, second):
        with pytest.raises(ApiError):
            lost.future.result(WAIT_S)
    last = piece(0.5)
    engine.submit(last)
    assert last.future.result(WAIT_S).translation.tokens == [0]
    assert engine.close(WAIT_S)
