"""A thread a model, which says what of that which waits is computed next.

Requests come as pieces: stretches of audio no longer than the model can hear. Each piece has a due
time, its request's arrival plus half a second for each second of that request's audio up to its
end, but at least half its own length after it comes. The earliest due goes first: a short request
overtakes the later pieces of long ones, however late these are, and no piece is overtaken for ever,
since due times do not move while new requests' do.
"""

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

from halve.translate import Translator
from serve.errors import internal, unavailable
from serve.pieces import DUE_PER_AUDIO_S, LATEST_DUE_S, Piece, Watcher
from serve.runners import Finished, Runner, runner_for

log = logging.getLogger("halve.serve")


class Engine:
    """A model, its thread and its queue."""

    def __init__(
        self,
        name: str,
        open_translator: Callable[[], Translator],
        *,
        batch_size: int = 16,
        reserve: bool = False,
        watcher: Watcher | None = None,
    ) -> None:
        self.name = name
        self.ready: Future[Translator] = Future()
        """The model's facts once it is loaded; the exception if it cannot be."""
        self._open = open_translator
        self._batch_size, self._reserve = batch_size, reserve
        self._watcher = watcher or Watcher()
        self._waiting: list[Piece] = []
        self._working: list[Piece] = []
        """Pieces that have left the queue and are not done."""
        self._changed = threading.Condition()
        self._closing = False
        # A daemon: a translation that cannot be interrupted must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def submit(self, piece: Piece) -> None:
        """Puts a piece in the queue; its future is resolved from the engine's thread."""
        ticket = piece.ticket
        ticket.audio_s += piece.duration_s
        piece.due_s = max(
            ticket.arrival_s + min(DUE_PER_AUDIO_S * ticket.audio_s, LATEST_DUE_S),
            time.monotonic() + DUE_PER_AUDIO_S * piece.duration_s,
        )
        with self._changed:
            if self._closing:
                fail(piece, unavailable("The model is being unloaded; try again."))
                return
            self._waiting.append(piece)
            self._watcher.queued(self.name, len(self._waiting))
            self._changed.notify()

    @property
    def is_crowded(self) -> bool:
        """Whether so many wait that long requests should hold back."""
        return self.waiting >= max(2, self._batch_size // 2)

    @property
    def waiting(self) -> int:
        """Pieces in the queue."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether it takes pieces on, or will once it is loaded."""
        return self._thread.is_alive() and not self._closing

    def close(self, wait_s: float) -> bool:
        """Ends the thread after its current step and frees the model; False if it still runs."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        translator = None
        try:
            translator = self._open()
            runner = runner_for(translator, self._batch_size, self._reserve)
        except BaseException as error:  # handed to whoever waits for the model
            if translator is not None:
                with contextlib.suppress(Exception):  # whoever waits must hear of the first error
                    translator.close()
                translator = None
            # What was loaded of it would live as long as the error does.
            traceback.clear_frames(error.__traceback__)
            with self._changed:
                self._closing = True
            self._drop_all()
            self.ready.set_exception(error)
            return
        self.ready.set_result(translator)
        try:
            while not self._closing:
                try:
                    self._advance(runner)
                except Exception:  # the thread must outlive anything
                    log.exception("%s: the engine failed", self.name)
                    runner.abandon()
                    self._fail_working(internal())
        finally:  # should it end all the same, nobody may wait for it
            with self._changed:
                self._closing = True
            self._fail_working(unavailable("The model was unloaded; try again."))
            self._drop_all()
            runner.abandon()
            translator.close()

    def _advance(self, runner: Runner) -> None:
        """Takes in what fits, then one step of the runner."""
        taken = self._take(runner)
        self._working += taken
        for piece in taken:
            if piece.future.set_running_or_notify_cancel():
                piece.started_s = time.monotonic()
                runner.add(piece)
        left = runner.step(crowded=bool(self._waiting))
        if runner.stepped:
            self._watcher.stepped(self.name, runner.stepped)
        for finished in left:
            self._finish(finished)
        if left:
            self._working = [piece for piece in self._working if not piece.future.done()]

    def _take(self, runner: Runner) -> list[Piece]:
        """The pieces to start now; waits for some if the runner has nothing to do."""
        with self._changed:
            while True:
                self._forget_cancelled()
                chosen = runner.choose(self._waiting) if self._waiting else []
                if chosen:
                    self._waiting = [piece for piece in self._waiting if piece not in chosen]
                self._watcher.queued(self.name, len(self._waiting))
                if chosen or runner.is_busy or self._closing:
                    return chosen
                self._changed.wait()

    def _forget_cancelled(self) -> None:
        for piece in self._waiting:
            if piece.ticket.cancelled:
                piece.future.cancel()
        self._waiting = [piece for piece in self._waiting if not piece.future.cancelled()]

    def _finish(self, finished: Finished) -> None:
        piece = finished.piece
        if finished.error is not None:
            fail(piece, finished.error)
            return
        outcome = finished.outcome()
        self._watcher.translated(self.name, piece, outcome)
        # Cancelled in between: nobody waits for it.
        with contextlib.suppress(Exception):
            piece.future.set_result(outcome)

    def _fail_working(self, error: Exception) -> None:
        failed, self._working = self._working, []
        for piece in failed:
            fail(piece, error)

    def _drop_all(self) -> None:
        with self._changed:
            dropped, self._waiting = self._waiting, []
            self._watcher.queued(self.name, 0)
        for piece in dropped:
            fail(piece, unavailable("The model was unloaded; try again."))


def fail(piece: Piece, error: Exception) -> None:
    """Tells whoever waits for a piece that it failed; nobody may."""
    with contextlib.suppress(Exception):
        piece.future.set_exception(error)
