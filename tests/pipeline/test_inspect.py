"""`halve inspect` names what is wrong with a directory: damage, loss, additions, a foreign tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.config import PruneConfig
from compress.prune import run_prune
from halve import artefact, shards
from halve.errors import ArtefactError
from halve.families import family_for
from halve.models import read_config
from halve.shard_writer import unchanged, write_shards
from pipeline.inspect_artefact import inspect
from tests import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A pruned model in many shards."""
    path = tmp_path_factory.mktemp("inspect")
    sharded = path / "sharded"
    sharded.mkdir()
    write_shards(sharded, [unchanged(each) for each in shards.iter_stored(tiny_model)], 200_000)
    shards.copy_side_files(tiny_model, sharded)
    shards.write_config(sharded, read_config(tiny_model))
    pruned = run_prune(PruneConfig(layers=(2,)), sharded, None, path / "pruned").path
    with artefact.writing(path / "student", "student", {}, 0, {"model": pruned}) as draft:
        parts = [unchanged(each) for each in shards.iter_stored(pruned)]
        write_shards(draft.path, parts, 200_000)
        shards.copy_side_files(pruned, draft.path)
        shards.write_config(draft.path, read_config(pruned))
    return path / "student"


def flip_a_byte(path: Path) -> str:
    shard = sorted(path.glob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    return f"{shard.name}: its sha256 differs"


def lose_a_shard(path: Path) -> str:
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    return f"{shard.name}: missing"


def add_a_file(path: Path) -> str:
    (path / "notes.txt").write_text("hello")
    return "notes.txt: not in the record"


def cut_a_shard(path: Path) -> str:
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    return f"{shard.name}: .* bytes, the record says"


def swap_the_tokenizer(path: Path) -> str:
    tokenizer = tiny.make_tokenizer(300)
    tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    return "tokenizer.json: .* not the tokenizer that the model was measured with"


@pytest.mark.parametrize(
    "harm", [flip_a_byte, lose_a_shard, add_a_file, cut_a_shard, swap_the_tokenizer]
)
def test_harm_is_named(harm: Callable[[Path], str], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    assert inspect(tmp_path / "copy").data["verified"] is True
    named = harm(tmp_path / "copy")
    with pytest.raises(ArtefactError, match=named):
        inspect(tmp_path / "copy")


@pytest.mark.parametrize("change", ["too many tokens", "no audio token"])
def test_a_foreign_tokenizer_is_named_without_a_record(
    change: str, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    inspect(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    if change == "too many tokens":
        tokenizer["model"]["vocab"]["another"] = 5000
    else:
        tokenizer["added_tokens"] = [
            token for token in tokenizer["added_tokens"] if token["content"] != "<|AUDIO|>"
        ]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ArtefactError, match="a foreign tokenizer"):
        inspect(tmp_path / "model")


def test_added_tokens_beyond_the_rows_are_no_foreign_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As Gemma 3 1B's, which has a token for images and no row for it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 512, "content": "<i>"})
    file.write_text(json.dumps(tokenizer))
    inspect(tmp_path / "model")


def test_what_a_downloader_leaves_is_no_harm(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "download.lock").touch()
    (copy / ".gitattributes").touch()
    assert artefact.verify(copy) == []


def test_weights_without_a_record_are_looked_at(whole: Path, tmp_path: Path) -> None:
    model = shutil.copytree(whole, tmp_path / "model")
    (model / artefact.RECORD).unlink()
    inspect(model)
    shards_there = sorted(model.glob("*.safetensors"))
    shards_there[0].write_bytes(shards_there[0].read_bytes()[:-10])
    with pytest.raises(ArtefactError, match=f"{shards_there[0].name} is damaged"):
        inspect(model)
    shards_there[0].unlink()
    with pytest.raises(ArtefactError, match=f"shards missing: {shards_there[0].name}"):
        inspect(model)


def test_shards_hold_what_the_single_file_held(whole: Path, tiny_model: Path) -> None:
    assert len(list(whole.glob("*.safetensors"))) > 3
    family = family_for(read_config(tiny_model))
    wanted = {
        family.kept_key(stored.key, [0, 1, 3, 4, 5]): b"".join(stored.pieces(1000))
        for stored in shards.iter_stored(tiny_model)
    }
    found = {stored.key: b"".join(stored.pieces()) for stored in shards.iter_stored(whole)}
    wanted.pop(None)
    assert found == wanted
    index = json.loads((whole / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(map(len, found.values()))
