"""The bench of the search: the same tokens from every method, and the keys that others rely on."""

import json
import lzma
import math
import shutil
from pathlib import Path

import torch

from benchmarks.baseline import StockModel
from benchmarks.config import ImportanceBenchConfig
from benchmarks.importance import is_faithful, run_importance_bench, top_two_gap
from benchmarks.importance_order import compare_orders
from compress.importance import make_task
from halve import artefact
from halve.corpus import read_corpus
from halve.json_files import read_json
from halve.models import load_model
from serve.plain import PlainTranslator
from tests.families import whisper_models
from tests.families.text_models import make_corpus as make_text_corpus
from tests.families.text_models import make_model as make_text_model


def test_one_round_of_each(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    config = ImportanceBenchConfig(lang="de", segments=2, also=("bounded",))
    made = run_importance_bench(config, tiny_model, tiny_corpus, tmp_path / "out")
    assert artefact.verify(made.path) == []
    result = read_json(made.path / "importance.json")
    assert result["same_order"] and result["differences"] == [] and result["near_ties"] == []
    assert result["near_tie_segments"] == 0 and result["max_score_difference"] == 0.0
    assert result["faithful"]
    for fault in (
        {"differences": [{"id": "a"}]},
        {"near_tie_share": 0.02},
        {"max_score_difference": 0.1},
        {"same_order_without_near_ties": False},
    ):
        assert not is_faithful({**result, **fault})
    assert result["ratio"] == result["reference_s"] / result["exact_s"]
    assert (result["segments"], result["candidates"]) == (2, 4)
    assert result["threads"] == torch.get_num_threads() and result["stock_loop_s"] > 0
    assert result["also"]["bounded"]["same_winner"]
    of = {name: made.path / f"{name}.jsonl.xz" for name in ("reference", "stock_loop", "exact")}
    assert len({path.read_bytes() for path in of.values()}) == 1
    lines = lzma.decompress(of["exact"].read_bytes()).decode("utf8").splitlines()
    assert len(lines) == 2 * 4 and json.loads(lines[0])["layer"] == 1


def test_text_models_have_a_round_too(tmp_path: Path) -> None:
    model, corpus = (
        make_text_model(tmp_path / "model", "llama"),
        make_text_corpus(tmp_path / "corpus"),
    )
    config = ImportanceBenchConfig(lang="de", segments=2)
    result = read_json(
        run_importance_bench(config, model, corpus, tmp_path / "out").path / "importance.json"
    )
    assert result["faithful"] and result["candidates"] >= 1


def test_stock_code_is_asked_without_the_releases_own_settings(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """A release that samples with a penalty is measured as everything else: greedily, without one."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    clip = read_corpus(tiny_corpus)
    audio = clip.audio(clip.split("select")[0])
    said = []
    for penalty in (1.0, 9.0):
        path = model / "generation_config.json"
        settings = {**read_json(path), "repetition_penalty": penalty, "do_sample": True, "top_k": 5}
        path.write_text(json.dumps(settings))
        plain = PlainTranslator(load_model(model))
        said.append(
            (
                StockModel(model, "fp32").generate(audio, "de", 12, exactly=True)[0],
                plain.translate([audio], "de", limits=[12])[0].tokens,
            )
        )
    assert said[0] == said[1]
    assert len(said[0][0]) == 12 and said[0][0][:3] == said[0][1][:3]


def test_the_gap_is_that_of_the_chosen_token(tiny_model: Path, tiny_corpus: Path) -> None:
    speech = load_model(tiny_model)
    corpus = read_corpus(tiny_corpus)
    task = make_task(speech, corpus, corpus.split("select", "de", 1), "de", "chrf++")
    assert top_two_gap(speech, task, [0, 1, 3, 4, 5], 0, []) > 0
    assert top_two_gap(speech, task, [0, 1, 3, 4, 5], 0, [7, 9]) > 0
    assert len(speech.part(speech.family.layers)) == 6


def test_the_gap_of_a_decoder_that_attends_to_an_encoder(tmp_path: Path, tiny_corpus: Path) -> None:
    speech = load_model(whisper_models.make_whisper(tmp_path / "whisper"))
    corpus = read_corpus(tiny_corpus)
    task = make_task(speech, corpus, corpus.split("select", "de", 1), "de", "chrf++")
    assert 0 < top_two_gap(speech, task, [0, 2, 3], 0, [7, 9]) < math.inf


def test_orders_of_whole_searches(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    made = compare_orders(
        tiny_model, tiny_corpus, tmp_path / "out", lang="de", remove=2, segments=2
    )
    assert artefact.verify(made.path) == []
    result = read_json(made.path / "order.json")
    assert all(search["same_order"] for search in result["searches"].values())
    assert result["differences"] == [] and result["max_score_difference"] == 0.0
    assert result["translations_compared"] == 2 * (4 + 3)
    criteria = result["criteria"]
    assert set(criteria) == {"exact", "loss", "block-influence", "angular", "middle", "random"}
    assert all(len(found["removed"]) == 2 for found in criteria.values())
    chosen = result["searches"]["exact"]
    assert criteria["exact"]["score"] == next(
        line["score"]
        for line in chosen["candidates"]
        if line["round"] == 2 and line["layer"] == chosen["removed"][1]
    )
