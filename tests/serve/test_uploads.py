"""Forms that were cut off, and disks that are full or gone."""

import logging
import os
import shutil
import tempfile
from typing import Any

import httpx
import pytest

from tests.serve.conftest import HTTP, Running, eventually, wav

FORM = {"content-type": "multipart/form-data; boundary=x"}
HEAD = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nfake\r\n'
FILE_HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


def post(server: Running, body: bytes) -> httpx.Response:
    return HTTP.post(f"{server.url}/v1/audio/translations", content=body, headers=FORM)


def refused(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info]


def test_a_form_that_was_cut_off_is_refused(serve_fake) -> None:
    with serve_fake() as server:
        body = HEAD + FILE_HEAD + wav(1.0)
        for end in (b"", b"\r\n", b"\r\n--x", b"\r\n--x\r\n", b"\r\n--x-"):
            refused(post(server, body + end), 400, "bad_form")
        for end in (b"\r\n--x--", b"\r\n--x--\r\n", b"\r\n--x--\r\nepilogue"):
            assert post(server, body + end).json() == {"text": "de 1.00"}
        eventually(server.nothing_left)


def test_a_directory_that_vanished_is_made_anew(serve_fake, caplog) -> None:
    with serve_fake() as server:
        first = server.service.directory
        shutil.rmtree(first)
        assert server.post(wav(0.5)).status_code == 200
        assert server.service.directory != first
        assert server.service.directory.stat().st_mode & 0o777 == 0o700
        assert str(first) in caplog.text
        # Nor can one be made while the place for it is gone; when it is back, all is well.
        place = first.parent
        shutil.rmtree(place)
        refused(server.post(wav(0.5)), 503, "no_space")
        place.mkdir()
        assert server.post(wav(0.5)).status_code == 200
    assert not tracebacks(caplog)


@pytest.mark.parametrize("duration_s", [0.01, 0.2, 20.0])
def test_a_full_disk_is_said_and_logged(
    duration_s: float, serve_fake, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def full(dir: Any) -> Any:
        return open("/dev/full", "r+b")

    with serve_fake() as server:
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        answer = server.post(wav(duration_s))
        refused(answer, 503, "no_space")
        assert int(answer.headers["retry-after"]) > 0
        monkeypatch.undo()
        assert server.post(wav(duration_s + 0.02)).status_code == 200
        eventually(server.nothing_left)
    assert "No space left" in caplog.text
    assert not tracebacks(caplog)


def test_uploads_leave_some_of_the_disk_free(serve_fake, monkeypatch, caplog) -> None:
    statvfs = os.fstatvfs
    taken: list[int] = []

    def small_disk(descriptor: int) -> Any:
        """A disk of 100 MB with 12 free, on which this upload lies."""
        values = list(statvfs(descriptor))
        taken.append(os.fstat(descriptor).st_size)
        values[1], values[2], values[4] = 1, 100_000_000, 12_000_000 - taken[-1]
        return os.statvfs_result(values)

    with serve_fake() as server:
        monkeypatch.setattr(os, "fstatvfs", small_disk)
        answer = server.post(wav(100.0))
        refused(answer, 503, "no_space")
        assert int(answer.headers["retry-after"]) > 0
        # It was stopped before less than a tenth was left.
        assert taken[0] == 0
        assert 0 < taken[-1] <= 2_000_000
        assert server.post(wav(0.5)).status_code == 200
        eventually(server.nothing_left)
    assert "12 MB free" not in caplog.text
    assert "MB free" in caplog.text
