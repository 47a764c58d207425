"""COMET in an environment of its own: JSON lines in on stdin, JSON lines out on stdout.

unbabel-comet needs older versions of transformers, numpy and protobuf than halve does, so this file
is run as a script by another Python, 3.8 or newer, and imports nothing of halve.

In:  {"checkpoint": PATH, "batch_size": N}, then one {"system", "id", "src", "mt", "ref"} a segment.
Out: one {"system", "id", "score"} a segment in the same order, then
     {"done": true, "name", "comet_version", "checkpoint_sha256", "segments"}.
What libraries print goes to stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path


def checkpoint_file(path: str) -> Path:
    """The model.ckpt of a COMET directory, or the file itself."""
    found = Path(path)
    return found / "checkpoints" / "model.ckpt" if found.is_dir() else found


def sha256(path: Path) -> str:
    """The hash of a file, read in pieces (Python 3.8 has no file_digest)."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def predict(checkpoint: Path, rows: list[dict[str, str]], batch_size: int) -> list[float]:
    """Segment scores of all rows, in order."""
    from comet.models import load_from_checkpoint

    model = load_from_checkpoint(str(checkpoint), local_files_only=True)
    data = [{key: row[key] for key in ("src", "mt", "ref")} for row in rows]
    import torch

    gpus = 1 if torch.cuda.is_available() else 0
    output = model.predict(
        data, batch_size=batch_size, gpus=gpus, num_workers=0, progress_bar=False
    )
    return [float(score) for score in output.scores]


def name_of(checkpoint: Path) -> str:
    """The model's name: of its folder, or in the hub's cache, where that is a commit, of the repository."""
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    if folder == checkpoint and checkpoint.name == "model.ckpt":
        folder = checkpoint.parent
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.replace("models--", "", 1).replace("--", "/")
    return folder.name


def main() -> None:
    """Answers one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)  # Lightning prints to stdout, which belongs to the answers.
    lines = [json.loads(line) for line in sys.stdin.buffer if line.strip()]
    request, rows = lines[0], lines[1:]
    checkpoint = checkpoint_file(request["checkpoint"])
    scores = predict(checkpoint, rows, int(request["batch_size"]))
    if len(scores) != len(rows):
        raise SystemExit(f"COMET gave {len(scores)} scores for {len(rows)} segments")
    for row, score in zip(rows, scores):  # noqa: B905  Python 3.8's zip has no `strict`
        answers.write(json.dumps({"system": row["system"], "id": row["id"], "score": score}) + "\n")
    summary = {
        "done": True,
        "name": name_of(checkpoint),
        "comet_version": comet_version(),
        "checkpoint_sha256": sha256(checkpoint),
        "segments": len(rows),
    }
    answers.write(json.dumps(summary) + "\n")
    answers.close()


def comet_version() -> str:
    """The version of unbabel-comet that scored."""
    import importlib.metadata

    return importlib.metadata.version("unbabel-comet")


if __name__ == "__main__":
    main()
