"""What the demo's teacher makes of people's speech: five sentences of a LibriVox reading, apart from `test`.

    python -m demo.measure_recorded --out runs/recorded

Nobody has translated these sentences, so what can be scored is what the model writes down of them, against the
package's transcripts (case and punctuation apart). Its translations stand beside, to be read. The sentences are from
a novel, the model knows software help and synthetic voices: this shows where it ends.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from demo.build_teacher import render_prompt
from demo.packages import fetch_recorded
from halve import environment, metrics
from halve.audio import read_audio
from halve.json_files import write_json

LANGS = ("en", "de", "zh")


def read_transcripts(folder: Path) -> dict[str, str]:
    """Transcripts by the file's stem, without case and punctuation."""
    lines = (folder / "transcription").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"<s> (.+) </s> \((.+)\)", line.strip()) for line in lines if line]
    return {match[2]: plain(match[1]) for match in found if match}


def plain(text: str) -> str:
    """Words alone, in lower case."""
    return " ".join(re.findall(r"[\w']+", text.casefold()))


def say(model: Any, processor: Any, audio: Any, lang: str) -> str:
    """What stock code makes of the audio, greedily: the transcript for English, else the translation."""
    inputs = processor(
        text=render_prompt(lang), audio=[audio], sampling_rate=16000, return_tensors="pt"
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=96)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return text


def measure(model_dir: Path, cache: Path) -> dict[str, Any]:
    """The model's output for each sentence, and the scores of its transcripts."""
    folder = fetch_recorded(cache)
    model = AutoModelForMultimodalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_dir)
    segments = []
    for name, transcript in read_transcripts(folder).items():
        audio = read_audio(folder / f"{name}.wav")
        found = {lang: say(model, processor, audio, lang) for lang in LANGS}
        segments.append({"id": name, "transcript": transcript, "heard": found})
    heard = [plain(segment["heard"]["en"]) for segment in segments]
    spoken = [segment["transcript"] for segment in segments]
    scores = {name: metrics.score(name, heard, spoken, "en") for name in ("chrf", "ter")}
    return {
        "command": "python -m demo.measure_recorded " + " ".join(sys.argv[1:]),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "transcripts": {
            name: {"score": found.score, "signature": found.signature}
            for name, found in scores.items()
        },
        "segments": segments,
    }


def table(result: dict[str, Any]) -> str:
    """The sentences as Markdown."""
    scores = ", ".join(f"{k} {v['score']:.1f}" for k, v in result["transcripts"].items())
    lines = [
        f"Five LibriVox sentences. What the model writes down of them: {scores}.",
        "",
        "| said | written down | German | Chinese |",
        "|---|---|---|---|",
    ]
    for segment in result["segments"]:
        cells = [segment["transcript"], *(segment["heard"][lang] for lang in LANGS)]
        lines.append("| " + " | ".join(cell.replace("|", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes recorded.json and README.md, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "teacher")
    parser.add_argument("--cache", type=Path, default=Path("runs/packages"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    result = measure(options.model, options.cache)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "recorded.json", result)
    (options.out / "README.md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
