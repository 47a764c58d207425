"""The server's settings. Reads no environment and imports no torch."""

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from halve.config import Config
from halve.errors import InputError


class ServeSettings(Config):
    """What is served, where, and how much of it one client may ask for."""

    models: tuple[str, ...] = Field(min_length=1)
    """Packages, students, teachers or hub ids; the first is loaded at the start, the others when first asked for."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs an API key or --allow-public."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and says which."""
    engine: Literal["auto", "plain"] = "auto"
    """auto: the package's runtime with batching; plain: stock transformers, one request at a time (a yardstick)."""
    api_key_file: Path | None = None
    """File whose first line is the key that clients must send as a bearer token."""
    allow_public: bool = False
    """Listen on a public address without an API key."""
    allow_hosts: tuple[str, ...] = ()
    """More host names that clients may use for this server (a proxy's, say); loopback servers answer only to localhost otherwise."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages elsewhere that may call this server (CORS), * for all; none by default."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory that loaded models may take together; the least recently used idle one makes room."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that a model computes with; default: all cores, and half of them for an ONNX or GGUF package, whose encoder works beside its decoder."""
    device: str = "auto"
    """Where checkpoints and fp16 ONNX packages compute: auto, cpu or cuda; other packages compute on the processor."""
    batch_size: int = Field(default=16, ge=1, le=256)
    """Most stretches of audio translated together."""
    reserve: bool = False
    """Take the memory of a full batch of the longest stretches at the start: more of it, and load cannot make it grow (packages)."""
    stop_loops: bool = False
    """Cut a translation that repeats itself, instead of at its token limit; the answer says so. Not for `--engine plain`."""
    segment_s: float | None = Field(default=None, ge=1.0)
    """Longest stretch of audio translated at once; default: as long as the model can hear."""
    max_upload_bytes: int = Field(default=128 * 1024 * 1024, ge=1024)
    """Largest upload."""
    max_audio_s: float = Field(default=3600.0, gt=0)
    """Longest audio of one request."""
    max_queue: int = Field(default=64, ge=1)
    """Requests that one model takes on at once; more are refused with 429."""
    max_concurrent: int = Field(default=256, ge=1)
    """Requests in the server at once, uploads included; more are refused with 429."""
    request_timeout_s: float = Field(default=590.0, gt=0)
    """Longest that a request may take, from its first byte to its answer; OpenAI's clients give up after 600 s, and ask again."""
    drain_s: float = Field(default=20.0, ge=0)
    """After SIGTERM, how long running requests may go on."""
    temp_dir: Path | None = None
    """Where the private directory for uploads is made; default: the system's."""

    @model_validator(mode="after")
    def _plain_is_stock_code(self) -> Self:
        if self.stop_loops and self.engine == "plain":
            raise ValueError(
                "stop_loops is not for the engine plain, which is stock transformers as it is"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def read_api_key(self) -> str | None:
        """The key that clients must send, if any.

        Raises:
            InputError: the file is missing, empty or not readable as text.
        """
        if self.api_key_file is None:
            return None
        try:
            lines = self.api_key_file.read_text(encoding="utf8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"The API key file {self.api_key_file} cannot be read ({error})",
                expected="a text file whose first line is the key",
            ) from None
        key = lines[0].strip() if lines else ""
        if not key or not key.isascii():
            raise InputError(
                f"The API key file {self.api_key_file} holds no key of ASCII characters in its first line",
                mend="write one, for example with: openssl rand -hex 32",
            )
        return key

    def check_exposure(self) -> str | None:
        """Refuses to serve the world without a key, unless that was asked for.

        Returns:
            a warning to show, or None.

        Raises:
            InputError: a public address, no key, and no --allow-public.
        """
        if self.is_loopback or self.api_key_file is not None:
            return None
        if not self.allow_public:
            raise InputError(
                f"--host {self.host} lets other machines in, and there is no API key",
                mend="give --api-key-file FILE, or --allow-public to serve without one",
            )
        return f"Anyone who can reach {self.host} may use this server: it asks for no API key."
