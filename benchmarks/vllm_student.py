"""A student's directory behind vLLM: two servers and nginx in front, one of them killed while it works.

    python -m benchmarks.vllm_student STUDENT --vllm BIN --corpus demo/corpus --lang de --lang zh --out DIR

BIN is the `vllm` command of an environment of its own (`benchmarks/peer_environments.sh`). Segments of `select` are sent as
docs/serving.md says, from several clients at once; every answer is compared with the translation of the same samples by the
student in float32 on torch. Writes vllm_student.json; exit status 1 if a request failed or a text differs but for near ties.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import soundfile

from benchmarks.balancer import balancer, need_nginx
from benchmarks.server_process import Server, free_port, kill, running
from benchmarks.soak import TIE_GAP
from benchmarks.ties import differs_at_tie
from benchmarks.workload import FloatArray
from halve import environment
from halve.audio import SAMPLE_RATE_HZ
from halve.corpus import read_corpus
from halve.families.base import SYSTEM_PROMPT
from halve.languages import language, token_limit
from halve.models import load_model
from halve.translate import TorchTranslator

NAME = "student"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves, asks, kills one server, compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", action="append", required=True)
    parser.add_argument("--limit", type=int, help="at most so many segments of select")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    need_nginx()
    corpus = read_corpus(given.corpus)
    segments = corpus.split("select", None, given.limit)
    audio = [corpus.audio(segment) for segment in segments]
    student = TorchTranslator(load_model(given.student, dtype="float32"))
    instructions = {lang: student.speech.family.instruction(language(lang)) for lang in given.lang}
    asked = [(lang, index) for lang in given.lang for index in range(len(audio))]
    with balanced(given.vllm, given.student) as (url, servers):
        rest = Asking(url, servers[0], killed_after=max(1, len(asked) // 3))
        started = time.monotonic()
        with ThreadPoolExecutor(given.clients) as clients:
            answers = list(
                clients.map(lambda each: rest.ask(audio[each[1]], instructions[each[0]]), asked)
            )
        seconds = time.monotonic() - started
    rows = []
    for lang in given.lang:
        mine = [answer for (code, _), answer in zip(asked, answers, strict=True) if code == lang]
        rows.append({"lang": lang, **compared(student, audio, lang, mine)})
    passed = all(not row["failed"] and not row["different"] for row in rows)
    facts = {
        "command": f"python -m benchmarks.vllm_student {' '.join(sys.argv[1:])}",
        "passed": passed,
        "rows": rows,
        "seconds": round(seconds, 1),
        "clients": given.clients,
        "killed_after_requests": rest.killed_after,
        "machine": environment.machine(),
        "versions": environment.versions(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "vllm_student.json").write_text(json.dumps(facts, indent=1) + "\n", "utf8")
    return 0 if passed else 1


@contextlib.contextmanager
def balanced(vllm: Path, student: Path) -> Iterator[tuple[str, list[Server]]]:
    """Two vLLM servers of a student, and the URL of the nginx in front of them."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(_vllm(vllm, student)) for _ in range(2)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proxy = stack.enter_context(balancer(folder, [server.url for server in servers]))
        yield proxy.url, servers


def _vllm(vllm: Path, student: Path) -> contextlib.AbstractContextManager[Server]:
    port = free_port()
    command = [str(vllm), "serve", str(student), "--served-model-name", NAME]
    command += ["--max-model-len", "2048", "--limit-mm-per-prompt", '{"audio": 1}']
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    return running(
        command,
        f"http://127.0.0.1:{port}",
        "/health",
        name="vLLM",
        env={**os.environ, **OFFLINE},
        startup_s=600,
        mend=f"try `{' '.join(command[:3])}`",
        of_its_own=True,
    )


class Asking:
    """Clients of one URL; one of its servers dies once so many requests are answered."""

    def __init__(self, url: str, server: Server, killed_after: int) -> None:
        self.killed_after = killed_after
        self._url, self._server = url, server
        self._answered, self._lock = 0, threading.Lock()

    def ask(self, samples: FloatArray, instruction: str) -> str | None:
        """The answer's text, or None if there was none."""
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")
        body = {
            "model": NAME,
            "temperature": 0,
            "max_tokens": token_limit(len(samples) / SAMPLE_RATE_HZ),
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": _content(file.getvalue(), instruction)},
            ],
        }
        answer = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=300)
        with self._lock:
            self._answered += 1
            if self._answered == self.killed_after:
                kill(self._server.process)
        if answer.status_code != 200:
            print(answer.status_code, answer.text[:300], file=sys.stderr)
            return None
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text.strip()


def _content(wav: bytes, instruction: str) -> list[dict[str, Any]]:
    audio = {"data": base64.b64encode(wav).decode(), "format": "wav"}
    return [
        {"type": "input_audio", "input_audio": audio},
        {"type": "text", "text": instruction},
    ]


def compared(
    student: TorchTranslator,
    audio: Sequence[FloatArray],
    lang: str,
    answers: Sequence[str | None],
) -> dict[str, Any]:
    """How many answers are the student's texts, and which are not."""
    expected = student.translate(audio, lang)
    failed = sum(answer is None for answer in answers)
    parted = [index for index, row in enumerate(expected) if answers[index] not in (None, row.text)]
    ties = [
        index
        for index in parted
        if differs_at_tie(
            student, audio[index], lang, expected[index].tokens, str(answers[index]), TIE_GAP
        )
    ]
    return {
        "segments": len(expected),
        "failed": failed,
        "equal": len(expected) - len(parted) - failed,
        "near_ties": len(ties),
        "different": [
            {"expected": expected[index].text, "found": answers[index]}
            for index in parted
            if index not in ties
        ],
    }


if __name__ == "__main__":
    raise SystemExit(main())
