"""Sends one real segment of the corpus to a running server, as any OpenAI client would.

python demo/ask_server.py http://127.0.0.1:8000 demo/corpus
"""

import sys
import time
from pathlib import Path

from openai import OpenAI

from halve.corpus import read_corpus


def main(url: str, corpus_dir: str) -> None:
    """Prints what was said, what the server answered, and the reference."""
    corpus = read_corpus(corpus_dir)
    segment = corpus.split("test")[0]
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    started = time.monotonic()
    with open(Path(corpus_dir) / segment.audio, "rb") as file:
        answer = client.audio.translations.create(file=file, model=model)
    seconds = time.monotonic() - started
    print(
        f"\nPOST {url}/v1/audio/translations  ({segment.duration_s:.1f} s of speech, {seconds:.2f} s)"
    )
    print(f"  said       {segment.source_text}")
    print(f"  translated {answer.text}")
    print(f"  reference  {segment.references['de']}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
