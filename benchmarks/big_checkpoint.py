"""Memory and time of the stages that only move weights, on a checkpoint too large to hold.

    python -m benchmarks.big_checkpoint --work-dir DIR --out benchmarks/results/DATE-big-checkpoint

makes a checkpoint of Qwen2-Audio-7B's layout and widths with fewer layers and random weights, then prunes,
merges and packages it. Each stage is a process of its own and ends with `sync`; beside each, in the same run,
stand `cp` and `sha256sum` of the bytes that the stage wrote, ended with `sync` too.

Memory is the kernel's VmHWM: the most pages resident at any time, pages of mapped files among them. Cached
file pages that no process maps are not counted. RssAnon and RssFile, sampled, say which were which.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halve import environment
from halve.families import family_for
from halve.json_files import write_json
from halve.shard_writer import Part, raw, write_shards

SHARD_BYTES = 4_000_000_000
RANK = 64
MEMORY_LIMIT_BYTES = 2_000_000_000
TIME_LIMIT = 1.5
_ROOT = Path(__file__).resolve().parents[1]
_HALVE = (sys.executable, "-c", "from pipeline.cli import main; main()")


def config_of(layers: int) -> dict[str, Any]:
    """Qwen2-Audio-7B-Instruct's published sizes with another number of decoder layers."""
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": 4,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 156032,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
    }


def generate(folder: Path, layers: int) -> None:
    """Writes the checkpoint: names and shapes are the stock class's, the numbers are random."""
    import torch
    import transformers

    from export.adapter import disk_key

    config = config_of(layers)
    family = family_for(config)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copyfile(_ROOT / "demo" / "teacher" / name, folder / name)
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copyfile(_ROOT / "demo" / "teacher" / name, folder / name)
    with torch.device("meta"):
        loader = getattr(transformers, family.auto_class)
        stock = loader.from_config(transformers.AutoConfig.from_pretrained(folder))
    parts = [
        _random(disk_key(family, key), tuple(value.shape), "BF16")
        for key, value in stock.state_dict().items()
    ]
    write_shards(folder, parts, SHARD_BYTES)


def generate_adapter(folder: Path, layers: int) -> None:
    """Writes a rank-stabilised adapter of rank 64 on every linear layer of the decoder, in float32."""
    text = config_of(layers)["text_config"]
    wide, narrow = text["intermediate_size"], text["hidden_size"]
    sizes = dict.fromkeys(
        [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")], (narrow, narrow)
    )
    sizes |= {"mlp.gate_proj": (wide, narrow), "mlp.up_proj": (wide, narrow)}
    sizes |= {"mlp.down_proj": (narrow, wide)}
    parts = []
    for layer in range(layers):
        for name, (rows, columns) in sizes.items():
            place = f"base_model.model.model.language_model.layers.{layer}.{name}"
            parts.append(_random(f"{place}.lora_A.weight", (RANK, columns), "F32"))
            parts.append(_random(f"{place}.lora_B.weight", (rows, RANK), "F32"))
    folder.mkdir(parents=True)
    write_shards(folder, parts, SHARD_BYTES)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 128, "use_rslora": True}
    write_json(folder / "adapter_config.json", {**settings, "bias": "none"})


def _random(key: str, shape: tuple[int, ...], kind: str) -> Part:
    import torch

    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[kind]
    numbers = math.prod(shape)

    def pieces() -> Iterator[memoryview]:
        source = torch.Generator().manual_seed(numbers)
        block = torch.randn(min(numbers, 1 << 22), generator=source) * 0.02
        for start in range(0, numbers, 1 << 22):
            # The same draw in another order and sign: new bytes without drawing 7 billion numbers.
            turned = block.roll(start % 9973) * (1 if start % 2 else -1)
            yield raw(turned[: numbers - start].to(dtype))

    return Part(key, kind, shape, numbers * dtype.itemsize, pieces)


def stage(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs one halve command to its end and syncs. Returns seconds, and peak memory in bytes."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen([*_HALVE, *arguments], cwd=_ROOT, stdout=subprocess.DEVNULL)
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for name, found in _status(process.pid).items():
            peaks[name] = max(peaks[name], found)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"halve {' '.join(arguments)} failed")
    ended = time.monotonic()
    os.sync()
    synced = time.monotonic()
    return {
        "seconds": synced - started,
        "of_it_final_sync_s": synced - ended,
        "peak_memory_bytes": peaks["VmHWM"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_mapped_file_bytes": peaks["RssFile"],
    }


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf8").splitlines()
    except OSError:  # it has just ended
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def copied(folder: Path, copy: Path) -> dict[str, float]:
    """Seconds that `cp`, `sha256sum` and `sync` take for the bytes of a directory."""
    os.sync()
    seconds = {}
    for name, command in (
        ("cp_s", ["cp", "-r", str(folder), str(copy)]),
        ("sha256sum_s", ["sh", "-c", f'find "{copy}" -type f -exec sha256sum {{}} +']),
        ("sync_s", ["sync"]),
    ):
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds[name] = time.monotonic() - started
    shutil.rmtree(copy)
    return {"seconds": sum(seconds.values()), **seconds}


def measure(work: Path, layers: int) -> list[dict[str, Any]]:
    """All stages, each beside its copy."""
    teacher, adapter, pruned = work / "teacher", work / "adapter", work / "pruned"
    student = work / "student"
    removed = ",".join(str(layer) for layer in removed_layers(layers))
    package = ["package", "--model", str(student), "--target", "checkpoint", "--lang", "de"]
    merge = ["merge", "--model", str(pruned), "--adapter", str(adapter)]
    runs: tuple[tuple[str, list[str], Path], ...] = (
        ("prune", ["prune", "--model", str(teacher), "--layers", removed], pruned),
        ("merge --onto dequantized", [*merge, "--onto", "dequantized"], student),
        ("merge --onto base", [*merge, "--onto", "base"], student),
        ("package bf16", [*package, "--precision", "bf16"], work / "bf16"),
        ("package nf4", [*package, "--precision", "nf4"], work / "nf4"),
    )
    rows: list[dict[str, Any]] = []
    for name, arguments, out in runs:
        shutil.rmtree(out, ignore_errors=True)
        found = stage([*arguments, "--out", str(out)])
        written = sum(entry.stat().st_size for entry in out.iterdir())
        beside = copied(out, work / "copy")
        row = {"stage": name, "written_bytes": written, **found, "copy": beside}
        rows.append({**row, "ratio": found["seconds"] / beside["seconds"]})
        print(_line(rows[-1]), flush=True)
        if out.parent == work and out not in (pruned, student):
            shutil.rmtree(out)
    return rows


def removed_layers(layers: int) -> list[int]:
    """A quarter of the layers, from the middle."""
    count = max(1, layers // 4)
    first = (layers - count) // 2
    return list(range(first, first + count))


HEAD = (
    "| stage | written | seconds | cp + sha256sum + sync | ratio | peak memory | of it mapped files |\n"
    "|---|---|---|---|---|---|---|"
)


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['stage']} | {row['written_bytes'] / 1e9:.2f} GB | {row['seconds']:.1f} "
        f"| {row['copy']['seconds']:.1f} | {row['ratio']:.2f} "
        f"| {row['peak_memory_bytes'] / 1e9:.2f} GB | {row['peak_mapped_file_bytes'] / 1e9:.2f} GB |"
    )


def main() -> None:
    """Makes what is missing, measures, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--work-dir", type=Path, required=True, help="needs about 35 GB; emptied")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--generate", action="store_true", help="only make the checkpoint")
    parser.add_argument("--out", type=Path, help="directory for big-checkpoint.json and README.md")
    given = parser.parse_args()
    left = given.layers - len(removed_layers(given.layers))
    if not (given.work_dir / "adapter").exists():
        _in_own_process(given.work_dir / "teacher", given.layers, "generate")
        _in_own_process(given.work_dir / "adapter", left, "generate_adapter")
    if given.generate:
        return
    print(HEAD)
    rows = measure(given.work_dir, given.layers)
    source = sum(entry.stat().st_size for entry in (given.work_dir / "teacher").iterdir())
    shards = len(list((given.work_dir / "teacher").glob("*.safetensors")))
    shutil.rmtree(given.work_dir)
    if given.out:
        _write(given.out, rows, source, shards, given.layers)
    slow = [row["stage"] for row in rows if row["ratio"] > TIME_LIMIT]
    large = [row["stage"] for row in rows if row["peak_memory_bytes"] > MEMORY_LIMIT_BYTES]
    if slow or large:
        raise SystemExit(f"Too slow: {slow or 'none'}. Too much memory: {large or 'none'}.")


def _in_own_process(folder: Path, layers: int, what: str) -> None:
    """Making the input must leave no memory in the process that starts the stages."""
    code = f"from pathlib import Path; from benchmarks import big_checkpoint as b; b.{what}(Path({str(folder)!r}), {layers})"
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)


def _write(out: Path, rows: list[dict[str, Any]], source: int, shards: int, layers: int) -> None:
    command = f"python -m benchmarks.big_checkpoint --work-dir DIR --layers {layers}"
    facts: dict[str, Any] = {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "checkpoint": {"bytes": source, "shards": shards, "decoder_layers": layers},
        "limits": {"memory_bytes": MEMORY_LIMIT_BYTES, "times_copy": TIME_LIMIT},
        "stages": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "big-checkpoint.json", facts)
    text = [
        f"# A checkpoint of {source / 1e9:.2f} GB in {shards} shards, {facts['date']}",
        "",
        f"`{command}` on {facts['machine']['cpu']}, {facts['machine']['cores']} cores; random weights in Qwen2-Audio-7B's "
        f"layout and widths, {layers} decoder layers. Each stage is a process of its own and ends with `sync`.",
        "",
        HEAD,
        *map(_line, rows),
        "",
        "Peak memory is VmHWM: every resident page, mapped files' among them; cached file pages that no process maps are not counted. "
        "Neither side starts",
        "with a dropped page cache: a stage finds its input, and `cp` the files just written, as far as memory holds them. `prune` "
        "also hashes its whole input.",
    ]
    (out / "README.md").write_text("\n".join(text) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
