"""Low-rank adapters (Hu et al. 2021; rank-stabilised scaling: Kalajdzievski 2023) on the decoder layers.

They go on the linear parts of the decoder layers and nowhere else: the audio tower, the projector, the
embeddings and the head stay as they are.
"""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from compress.config import AdapterConfig
from halve.errors import InputError, MissingExtraError
from halve.models import SpeechModel


def put_adapter_on(config: AdapterConfig, speech: SpeechModel) -> Any:
    """Puts a fresh adapter on the model, in place; returns peft's model around it.

    Only the adapter's weights, in float32, can train afterwards.

    Raises:
        InputError: a rank that no layer has.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError("peft", "train") from None
    _check_rank(config.rank, speech)
    speech.model.requires_grad_(False)
    torch.manual_seed(config.seed)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        lora_dropout=config.dropout,
        target_modules=decoder_linears(speech),
        bias="none",
    )
    with warnings.catch_warnings():
        # peft asks transformers for an attribute that has a new name.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(speech.model, settings)


def _check_rank(rank: int, speech: SpeechModel) -> None:
    """Refuses a rank above that of every weight: the adapter would be larger than what it changes."""
    most = max(min(one.in_features, one.out_features) for _, one in _linears(speech))
    if rank > most:
        raise InputError(
            f"An adapter of rank {rank} is larger than the layers that it goes on",
            expected=f"--rank of at most {most}, the highest that a weight of this model has",
        )


def _linears(speech: SpeechModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear parts of the decoder layers, each with its name in its layer."""
    for layer in speech.part(speech.family.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield name, module


def decoder_linears(speech: SpeechModel) -> str:
    """A regular expression for the in-memory names of all linear parts of the decoder layers."""
    names = {name for name, _ in _linears(speech)}
    choices = "|".join(re.escape(name) for name in sorted(names))
    return rf"{re.escape(speech.family.layers)}\.\d+\.({choices})"
