"""Uploads, read within limits into files that have no name.

A multipart parser of our own, small, because the framework's keeps no limit on the bytes of a file
and chooses where to put it.
"""

import asyncio
import base64
import binascii
import contextlib
import logging
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import python_multipart as multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from serve.errors import ApiError, bad_field, busy, too_large, unavailable

log = logging.getLogger("halve.serve")

FIELD_BYTES = 64 * 1024
MOST_PARTS = 32
IN_THREAD_BYTES = 1 << 20
"""Writes are gathered to this size and then made in a thread, off the event loop."""
KEPT_FREE_SHARE = 0.1
KEPT_FREE_BYTES = 512 * 1024 * 1024
"""Uploads together leave this share of the file system free, or this much where that is less."""


def no_space() -> ApiError:
    """An upload that cannot be stored now."""
    return unavailable("The server cannot store the upload now.", code="no_space")


def storage_failed(error: OSError) -> ApiError:
    """The same, with the reason in the server's log."""
    log.warning("an upload cannot be stored: %s", error)
    return no_space()


def private_file(directory: Path) -> BinaryIO:
    """A file in the private directory that vanishes with its last handle, whatever happens.

    Raises:
        ApiError: the server's disk is full or gone.
    """
    try:
        return tempfile.TemporaryFile(dir=directory)
    except OSError as error:
        raise storage_failed(error) from None


def close_file(file: BinaryIO) -> None:
    """Closes a private file, whose content no longer matters.

    What could not be written before is tried once more by close(), and fails once more.
    """
    with contextlib.suppress(OSError):
        file.close()


@dataclass
class Form:
    """A multipart form: its text fields and its one file."""

    fields: dict[str, str] = field(default_factory=dict)
    file: BinaryIO | None = None

    def close(self) -> None:
        if self.file is not None:
            close_file(self.file)


class _FormReader:
    """Callbacks of the parser; holds the form so far."""

    def __init__(self, directory: Path) -> None:
        self.form = Form()
        self.pending = bytearray()
        self.is_whole = False
        """Whether the boundary that ends a form was seen."""
        self._directory = directory
        self._name = ""
        self._value = bytearray()
        self._in_file = False
        self._parts = 0
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, a, b: self._header.extend(data[a:b]),
            "on_header_value": lambda data, a, b: self._header_value.extend(data[a:b]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._form_end,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise ApiError(400, f"The form has more than {MOST_PARTS} fields.", code="bad_form")
        self._value = bytearray()
        self._disposition = b""
        self._in_file = False

    def _header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise ApiError(400, "A part of the form has no name.", code="bad_form")
        self._name = options[b"name"].decode("utf8", "replace")
        if self._name != "file":
            return
        if self.form.file is not None:
            raise bad_field("file", "The form holds more than one file.")
        self.form.file = private_file(self._directory)
        self._in_file = True

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.pending.extend(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > FIELD_BYTES:
            said = f"The field is longer than {FIELD_BYTES} bytes; audio belongs in the field named file."
            raise bad_field(self._name[:64], said)

    def _end(self) -> None:
        if not self._in_file:
            self.form.fields[self._name] = self._value.decode("utf8", "replace")

    def _form_end(self) -> None:
        self.is_whole = True

    async def flush(self) -> None:
        """Writes what has gathered."""
        if self.pending and self.form.file is not None:
            data, self.pending = bytes(self.pending), bytearray()
            await asyncio.to_thread(_write, self.form.file, data)


def _write(file: BinaryIO, data: bytes) -> None:
    try:
        _check_space(file, len(data))
        file.write(data)
        file.flush()
    except OSError as error:
        raise storage_failed(error) from None


def _check_space(file: BinaryIO, size_bytes: int) -> None:
    """Refuses what would fill the disk, or the memory where the directory lies in it."""
    disk = os.fstatvfs(file.fileno())
    kept = min(KEPT_FREE_BYTES, KEPT_FREE_SHARE * disk.f_blocks * disk.f_frsize)
    free = disk.f_bavail * disk.f_frsize
    if free - size_bytes < kept:
        log.warning("an upload is refused: the disk has %d MB free", free // 1_000_000)
        raise no_space()


async def read_form(
    content_type: str, stream: AsyncIterator[bytes], max_bytes: int, directory: Path
) -> Form:
    """Reads a multipart form; the caller closes it.

    Raises:
        ApiError: not a form, damaged, too large, several files.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(
            400,
            "Send the audio as multipart/form-data with the fields file and model.",
            code="bad_form",
        )
    reader, size = _FormReader(directory), 0
    try:
        parser = multipart.MultipartParser(options[b"boundary"], reader.callbacks())  # type: ignore[arg-type]
        async for chunk in stream:
            size += len(chunk)
            if size > max_bytes:
                raise too_large(max_bytes)
            parser.write(chunk)
            if len(reader.pending) >= IN_THREAD_BYTES:
                await reader.flush()
        parser.finalize()
        if not reader.is_whole:
            raise ApiError(400, "The multipart form was cut off.", code="bad_form")
        await reader.flush()
    except FormParserError:
        reader.form.close()
        raise ApiError(400, "The multipart form is damaged.", code="bad_form") from None
    except BaseException:
        reader.form.close()
        raise
    return reader.form


class BodyRoom:
    """Memory that bodies held whole may take together."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.taken_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Counts more bytes.

        Raises:
            ApiError: there is no room for them now (429).
        """
        if self.taken_bytes + size_bytes > self._most:
            raise busy("The server holds as many large chat requests as it may; try again later.")
        self.taken_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """The bytes are gone."""
        self.taken_bytes -= size_bytes


@asynccontextmanager
async def read_body(
    stream: AsyncIterator[bytes], max_bytes: int, room: BodyRoom
) -> AsyncIterator[bytes]:
    """Reads a whole body, which may take its room until the block ends.

    Raises:
        ApiError: too large, or no room for it now.
    """
    parts, size = [], 0
    try:
        async for chunk in stream:
            room.take(len(chunk))
            size += len(chunk)
            if size > max_bytes:
                raise too_large(max_bytes)
            parts.append(chunk)
        body = b"".join(parts)
        parts.clear()
        yield body
    finally:
        room.give_back(size)


def store_base64(data: str, directory: Path) -> BinaryIO:
    """Decodes base64 (also as a data: URL) into a private file.

    Raises:
        ApiError: not base64, or empty.
    """
    if data.startswith("data:"):
        data = data.partition(",")[2]
    if "\n" in data:  # base64 in lines, as many programs write it
        data = data.replace("\r", "").replace("\n", "")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise bad_field("messages", "input_audio.data is not base64.") from None
    if not content:
        raise bad_field("messages", "input_audio.data is empty.")
    file = private_file(directory)
    try:
        _write(file, content)
    except BaseException:
        close_file(file)
        raise
    return file
