"""Makes a small COMET checkpoint with random weights; run by the Python of COMET's own environment.

python -I tiny_comet.py FOLDER [REFERENCE_SCORES_OF JSON]
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path


def make_encoder(folder: Path) -> None:
    """An XLM-R of two small layers, and a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = list(string.ascii_letters + string.digits + " ▁.,äöüß")
    vocabulary = [(token, 0.0) for token in special] + [(letter, -4.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 4, "cls": 0, "sep": 2}
    marks = {f"{name}_token": special[place] for name, place in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(str(folder))
    XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        pad_token_id=1,
    ).save_pretrained(str(folder))


def make_checkpoint(folder: Path) -> None:
    """The layout of published COMET models: hparams.yaml and checkpoints/model.ckpt."""
    import pytorch_lightning
    import torch
    import yaml
    from comet.models import RegressionMetric

    torch.manual_seed(0)
    encoder = folder / "encoder"
    make_encoder(encoder)
    model = RegressionMetric(
        encoder_model="XLM-RoBERTa",
        pretrained_model=str(encoder),
        hidden_sizes=[24],
        load_pretrained_weights=False,
        local_files_only=True,
    )
    trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    (folder / "checkpoints").mkdir()
    trainer.save_checkpoint(str(folder / "checkpoints" / "model.ckpt"))
    settings = dict(model.hparams) | {"class_identifier": "regression_metric"}
    plain = json.loads(json.dumps(settings, default=str))
    (folder / "hparams.yaml").write_text(yaml.safe_dump(plain))


def score_directly(folder: Path, rows: list[dict[str, str]]) -> list[float]:
    """COMET's own scores, as its documentation calls it, to hold the worker's against."""
    from comet.models import load_from_checkpoint

    model = load_from_checkpoint(str(folder / "checkpoints" / "model.ckpt"), local_files_only=True)
    return [float(x) for x in model.predict(rows, batch_size=1, gpus=0, num_workers=0).scores]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        print("scores", json.dumps(score_directly(place, json.loads(sys.argv[2]))))
    else:
        make_checkpoint(place)
