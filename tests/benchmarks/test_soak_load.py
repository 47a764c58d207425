"""A soak's clients tell a request that was cut off from one that was never taken."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from benchmarks import soak_load
from benchmarks.soak import missing
from benchmarks.soak_audio import Sound
from benchmarks.soak_load import Answer, Client, Record, Stock

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\ncontent-type: application/json\r\n\r\n"
FAILED = b'data: {"type": "transcript.text.delta", "delta": "Der"}\n\ndata: {"error": {"message": "stopped"}}\n\n'

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes the connection and nothing else."""
    writer.close()


async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begins to answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
    writer.write(HEAD + b'{"text": "Der')
    await writer.drain()
    writer.close()


def load(serve: Serve, stopped: bool) -> Record:
    """What a client records of a server that does so, told to stop before or not."""

    async def run() -> Record:
        record, stopping = Record(), asyncio.Event()
        if stopped:
            stopping.set()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        sound = Sound("a.wav", b"RIFF" * 100, np.zeros(100, np.float32))
        client = Client(f"http://127.0.0.1:{port}", ["m"], "de", Stock([sound], [sound], {}), 3)
        async with server:
            await client.run(record, time.monotonic() + 0.2, stopping)
        return record

    return asyncio.run(run())


@pytest.mark.parametrize("stopped", [False, True])
def test_an_answer_cut_off_is_a_fault_whenever_it_is(stopped: bool) -> None:
    record = load(cut_off, stopped)
    assert record.faults and "a request was lost" in record.faults[0]
    assert not record.refused_connections


@pytest.mark.parametrize("ask", ["stream", "chat stream"])
@pytest.mark.parametrize("body", [FAILED, b""])
def test_a_stream_that_the_server_gives_up_is_a_fault(
    ask: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_load, "FORMATS", (ask,))
    for share in ("HOSTILE_SHARE", "LEAVING_SHARE", "LONG_SHARE", "CHAT_SHARE"):
        monkeypatch.setattr(soak_load, share, 0.0)

    async def give_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    record = load(give_up, False)
    assert record.faults and not record.answers
    assert "ended with" in record.faults[0]


def test_a_request_never_taken_is_refused_after_the_stop_and_a_fault_before() -> None:
    after = load(hang_up, True)
    assert after.refused_connections == 1 and not after.faults
    before = load(hang_up, False)
    assert before.faults and not before.refused_connections


@pytest.mark.parametrize(
    ("segments", "said", "fault"),
    [
        ([(0.0, 2.0, "eins"), (2.0, 5.0, "zwei")], "eins zwei", ""),
        ([(0.0, 5.0, "eins")], "eins", ""),
        ([(0.0, 2.0, "eins"), (3.0, 5.0, "zwei")], "eins zwei", "nothing between 2.00 and 3.00 s"),
        ([(1.0, 2.0, "eins"), (2.0, 5.0, "zwei")], "eins zwei", "nothing between 0.00 and 1.00 s"),
        ([(0.0, 2.0, "eins"), (2.0, 4.0, "zwei")], "eins zwei", "it ends at 4.00 of 5.00 s"),
        ([(0.0, 2.0, "eins"), (2.0, 5.0, "zwei")], "eins", "text of no stretch"),
    ],
)
def test_what_a_long_answer_leaves_out_is_a_fault(
    segments: list[tuple[float, float, str]], said: str, fault: str
) -> None:
    assert missing(Answer("long", said, tuple(segments)), 5.0) == fault
