"""Embedding similarity with a small encoder made here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import embedding
from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from benchmarks.tables import quality_table
from halve.errors import InputError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT over single letters."""
    path = tmp_path_factory.mktemp("encoders") / "tiny-bert"
    letters = {
        token: at for at, token in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz,."])
    }
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


def one_by_one(encoder: Path, left: str, right: str) -> float:
    """The same without batches or padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    vectors = []
    for text in (left, right):
        ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            states = model.eval()(ids).last_hidden_state[0]
        vectors.append(states.mean(dim=0))
    return float(torch.nn.functional.cosine_similarity(*vectors, dim=0))


def test_cosines_are_those_of_single_sentences(encoder: Path) -> None:
    said = ["Ein Satz.", "Etwas ganz anderes", "Ein Satz.", "ein"]
    longer = "Noch ein längerer Satz, der anders ist."
    references = ["Ein Satz.", longer, longer, "Ein Satz."]
    found = embedding.measure(str(encoder), {"a": said, "b": references}, references, batch_size=3)
    assert found.scores["b"] == pytest.approx([1.0] * 4, abs=1e-5)
    for at, (left, right) in enumerate(zip(said, references, strict=True)):
        assert found.scores["a"][at] == pytest.approx(one_by_one(encoder, left, right), abs=1e-5)
    assert found.scores["a"][0] == pytest.approx(1.0, abs=1e-5) and found.scores["a"][1] < 0.9999
    assert found.signature.startswith("embedding_similarity|model:tiny-bert|sha256:")


def test_empty_texts_have_nothing_in_common(encoder: Path) -> None:
    found = embedding.measure(str(encoder), {"a": ["", "x", ""]}, ["Ein Satz.", "", ""])
    assert found.scores["a"] == [0.0, 0.0, 0.0]


def test_it_stands_beside_the_scores_under_its_own_name(
    encoder: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = QualityConfig(lang="de", limit=3, controls=False, embedding_model=str(encoder))
    done = run_quality(config, tiny_model, [tiny_model], tiny_corpus, tmp_path / "out")
    result = json.loads((done.path / "quality.json").read_text())
    (student,) = result["students"]
    assert (
        student["scores"]["embedding_similarity"]
        == result["teacher"]["scores"]["embedding_similarity"]
    )
    assert student["retention"]["embedding_similarity"]["percent"] == pytest.approx(100)
    lines = (done.path / "embedding_similarity" / f"{student['name']}.txt").read_text().split()
    assert len(lines) == 3
    table = quality_table(result)
    assert "embedding similarity" in table.header and "COMET" not in table.header
    assert result["comet"]["measured"] is False


def test_an_encoder_that_fills_no_batch_is_refused_before_anything_is_translated(
    encoder: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    config = QualityConfig(lang="de", limit=3, embedding_model=str(broken))
    with pytest.raises(InputError, match=r"embeds no text: .*pad"):
        run_quality(config, tiny_model, [], tiny_corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no embedding model"):
        embedding.measure(str(tmp_path), {}, [])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        embedding.measure(str(tmp_path), {}, [])
