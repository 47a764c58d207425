"""A request that ends while a thread still decodes for it."""

import asyncio
import gc
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.answers import EventStream
from serve.audio_input import Recording
from serve.errors import ApiError, bad_audio
from serve.jobs import AHEAD, Job
from serve.pieces import Piece, Ticket
from serve.upload import private_file
from tests.serve.conftest import eventually, wav


class Stuck(Recording):
    """Inside a call of the decoder that takes as long as the test wants."""

    entered: threading.Event
    gate: threading.Event
    seen: bytes = b""

    def blocks(self) -> Iterator[np.ndarray]:
        self.entered.set()
        assert self.gate.wait(60)
        descriptor = self.file.fileno()
        os.lseek(descriptor, 0, os.SEEK_SET)
        self.seen = os.read(descriptor, 4)
        raise bad_audio("It is damaged.")
        yield


def stuck_job(file: Any, readers: ThreadPoolExecutor) -> tuple[Job, Stuck]:
    recording = Stuck(file, 60.0)
    recording.entered, recording.gate = threading.Event(), threading.Event()
    nothing: Any = None
    return Job(nothing, nothing, recording, "de", 30.0, Ticket(), readers), recording


def test_nobody_waits_for_a_thread_inside_the_decoder(tmp_path: Path) -> None:
    async def scenario(readers: ThreadPoolExecutor) -> None:
        upload = private_file(tmp_path)
        upload.write(wav(1.0))
        upload.flush()
        number = upload.fileno()
        job, recording = stuck_job(upload, readers)
        task = asyncio.create_task(job.run())
        try:
            await asyncio.to_thread(recording.entered.wait, 60)
            task.cancel()
            await asyncio.wait({task}, timeout=10)
            assert task.done()
            upload.close()
            # Another client's upload gets the number of the file that was closed.
            other = private_file(tmp_path)
            assert other.fileno() == number
            other.write(b"first half, ")
            other.flush()
        finally:
            recording.gate.set()
        await asyncio.to_thread(eventually, lambda: recording.file.closed)
        other.write(b"second half")
        other.seek(0)
        assert other.read() == b"first half, second half"
        other.close()
        assert recording.seen == b"RIFF"

    with ThreadPoolExecutor(1) as readers:
        asyncio.run(scenario(readers))


def test_a_job_that_waits_for_a_thread_leaves_no_file_open(tmp_path: Path) -> None:
    async def scenario(readers: ThreadPoolExecutor) -> None:
        with tempfile.TemporaryFile(dir=tmp_path) as upload:
            first, busy = stuck_job(upload, readers)
            second, waits = stuck_job(upload, readers)
            tasks = [asyncio.create_task(job.run()) for job in (first, second)]
            await asyncio.to_thread(busy.entered.wait, 60)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=10)
            assert waits.file.closed
            assert not busy.file.closed
            busy.gate.set()
            await asyncio.to_thread(eventually, lambda: busy.file.closed)
            assert not waits.entered.is_set()

    with ThreadPoolExecutor(1) as readers:
        asyncio.run(scenario(readers))


def test_a_client_that_leaves_prints_no_traceback(tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []

    async def scenario(readers: ThreadPoolExecutor) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, found: complaints.append(found))
        with tempfile.TemporaryFile(dir=tmp_path) as upload:
            job, recording = stuck_job(upload, readers)
            task = asyncio.create_task(job.run())
            await asyncio.to_thread(recording.entered.wait, 60)
            task.cancel()
            asyncio.get_running_loop().call_later(0.1, recording.gate.set)
            await asyncio.wait({task})
            await asyncio.to_thread(recording.gate.wait, 60)
            await asyncio.to_thread(readers.shutdown)
            del job, task, recording
            await asyncio.sleep(0)
            gc.collect()

    with ThreadPoolExecutor(1) as readers:
        asyncio.run(scenario(readers))
    assert not complaints


def test_the_time_limit_holds_inside_the_decoder(
    serve_fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(recording: Recording, *_: Any) -> Iterator[np.ndarray]:
        gate.wait(20)
        yield np.zeros(16_000, np.float32)

    monkeypatch.setattr(Recording, "_sound_blocks", slow)
    with serve_fake(request_timeout_s=0.5) as server:
        try:
            began_s = time.monotonic()
            answer = server.post(wav(1.0))
            assert (answer.status_code, time.monotonic() - began_s < 10) == (504, True)
        finally:
            gate.set()
        eventually(server.nothing_left)


def test_pieces_that_fail_together_print_nothing(tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []
    pieces: list[Piece] = []

    class Failing:
        """An engine that fails all pieces of a long recording at once."""

        is_crowded = False

        def submit(self, piece: Piece) -> None:
            pieces.append(piece)
            if len(pieces) == AHEAD:
                for each in pieces:
                    each.future.set_exception(bad_audio("It failed."))

    async def scenario(readers: ThreadPoolExecutor) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, found: complaints.append(found))
        with private_file(tmp_path) as upload:
            upload.write(wav(30.0))
            upload.flush()
            parts: list[Any] = [None, Failing(), Recording(upload, 60.0), "de", 2.0]
            with pytest.raises(ApiError, match="It failed"):
                await Job(*parts, Ticket(), readers).run()
        await asyncio.sleep(0)
        pieces.clear()
        gc.collect()

    with ThreadPoolExecutor(1) as readers:
        asyncio.run(scenario(readers))
    assert not complaints


@pytest.mark.parametrize("version", ["2.3", "2.4"])  # as uvicorn says, and newer
def test_a_stream_that_nobody_reads_ends(version: str) -> None:
    let_go: list[bool] = []

    async def scenario() -> None:
        async def events() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"

        async def never(message: Any) -> None:
            await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        held = AsyncExitStack()
        held.callback(let_go.append, True)
        stream = EventStream(events(), held, 0.2)
        scope = {"type": "http", "asgi": {"spec_version": version}}
        await asyncio.wait_for(stream(scope, receive, never), 10)

    asyncio.run(scenario())
    assert let_go == [True]
