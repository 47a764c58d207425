"""Settings of the stages that make a student. No torch: the command line reads them for its help."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from halve.config import Config, Positive, Seed

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Langs = Annotated[tuple[str, ...], Field(min_length=1)]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16"]
Arithmetic = Literal["auto", "float32", "bfloat16"]


def _check_weights(weights: str, precision: str) -> None:
    if weights == "bfloat16" and precision == "float32":
        raise ValueError("weights in bfloat16 compute in bfloat16, not with precision float32")


class TrainingConfig(Config):
    """What full fine-tuning and adapter tuning have in common."""

    # How it is computed, not what: a run goes on elsewhere, or in less memory.
    DECIDES_NOTHING = frozenset(
        {"checkpoint_every", "checkpoint_activations", "device", "rows_at_once"}
    )

    langs: Langs
    """Target languages; the model learns them together."""
    epochs: Positive = 3
    """Passes over the training rows."""
    max_steps: Positive | None = None
    """Stop after so many optimiser steps, if that is before the epochs end."""
    batch_size: Positive = 4
    """Training rows (one text of one segment) in an optimiser step."""
    rows_at_once: Positive | None = None
    """Training rows whose gradients are computed together and then summed, where memory has no room for a whole batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls, to zero at the end."""
    warmup: Fraction = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay; norms and biases have none."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    label_smoothing: Fraction = 0.0
    """Probability mass spread over the vocabulary in the loss."""
    spec_mask: Fraction = 0.0
    """Share of the audio's positions blanked in each step, in spans (after SpecAugment)."""
    share_audio: bool = True
    """Run all texts of a segment behind one copy of its audio: the same loss for less work."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: slower, and far less memory."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; a killed run goes on from the last one."""
    eval_every: Positive | None = None
    """Steps between scores on `select`; once an epoch if not given."""
    select_segments: Annotated[int, Field(ge=0)] | None = None
    """How many `select` segments are scored; all if not given, 0 for none (the last state is kept)."""
    patience: Positive | None = None
    """Stop after so many scores in a row that are no better than the best."""
    train_segments: Positive | None = None
    """Use so many segments of `train`, spread evenly; all if not given."""
    device: str = "auto"
    """cpu, cuda, auto, or split: the layers spread over all GPUs of this machine."""
    seed: Seed = 0
    """Order of the batches and every other choice made by chance."""


class AdapterConfig(TrainingConfig):
    """Training that may go through a low-rank adapter."""

    rank: Positive = 64
    """Rank of the adapter."""
    alpha: Positive = 128
    """Scale of the adapter, divided by the rank's root (rsLoRA) or the rank."""
    rslora: bool = True
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    dropout: Fraction = 0.0
    """Dropout in front of the adapter."""

    @model_validator(mode="after")
    def _an_adapter_there_is(self) -> Self:
        own = ("rank", "alpha", "rslora", "dropout")
        given = [name for name in own if getattr(self, name) != self.default(name)]
        if given and getattr(self, "method", None) == "full":
            raise ValueError(f"{', '.join(given)}: an adapter's, and method full trains none")
        return self


class TeachConfig(AdapterConfig):
    """Fine-tuning of the base model on the corpus: the teacher."""

    method: Literal["full", "lora"] = "full"
    """full trains every weight but a frozen tower's; lora trains an adapter on the decoder layers and merges it: a fraction of the memory."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.001
    """AdamW's decoupled weight decay; norms and biases have none."""
    transcribe: bool = False
    """Also learn to transcribe: a help for models that must first learn to hear."""
    freeze_audio: bool = True
    """Leave the audio tower as it is, and compute its states only once."""
    projector_factor: Annotated[float, Field(gt=0)] = 1.0
    """The projector's learning rate as a multiple of the rest's."""
    projector_only_steps: Annotated[int, Field(ge=0)] = 0
    """First train the projector alone for so many steps: spares a decoder that knows text only."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop after so many minutes of training, the schedule following the clock. No two such runs are alike."""
    precision: Arithmetic = "auto"
    """Arithmetic: bfloat16 is autocast over float32 weights; auto takes it where the device has units for it, else float32."""
    weights: Precision = "float32"
    """How weights and optimiser state are kept; bfloat16 takes half the memory and learns less finely."""

    @model_validator(mode="after")
    def _computes_in_what_it_keeps(self) -> Self:
        _check_weights(self.weights, self.precision)
        return self


class ImportanceConfig(Config):
    """The layer-importance search."""

    DECIDES_NOTHING = frozenset({"workers", "ray_address"})

    remove: Positive
    """How many decoder layers to remove."""
    lang: str
    """Target language whose translations are scored."""
    metric: str | None = None
    """Selection metric: bleu, chrf or chrf++; the language's own if not given (chrf++, or chrf for Chinese)."""
    method: Literal[
        "exact",
        "reference",
        "bounded",
        "racing",
        "block-influence",
        "angular",
        "loss",
        "random",
        "middle",
        "spaced",
    ] = "exact"
    """exact ranks as the paper does; reference keeps the paper's one-by-one procedure; bounded and racing stop early what cannot, or will hardly, win; the others do not translate."""
    split: Literal["select", "train", "test"] = "select"
    """Split that layers are ranked on; test is refused."""
    segments: Positive | None = None
    """How many segments are scored, spread evenly; all if not given."""
    batch_size: Positive = 128
    """The most segments worked on at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the search."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Most memory for what the search keeps beside the model; two fifths of the device's if not given, on a GPU no more than is left beside the model less a fifth."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.99
    """How sure racing must be that a candidate will not win before it stops it."""
    shortlist: Positive | None = None
    """Try only so many layers in each round, those that a cheap criterion would remove first; all if not given."""
    shortlist_by: Literal["block-influence", "angular", "loss"] = "block-influence"
    """The cheap criterion of the shortlist, taken once, on the whole model."""
    workers: Positive = 1
    """Processes with a model each, on Ray; threads and memory are divided by their number. Any number finds the same."""
    ray_address: str | None = None
    """An existing Ray cluster, such as 10.0.0.1:6379 or auto; a local one is started if not given."""
    seed: Seed = 0
    """Choices made by chance: random's layers, racing's resamples."""


class PruneConfig(Config):
    """Cutting decoder layers out."""

    layers: tuple[int, ...] | None = None
    """Layers to remove, numbered from 0; those of the plan if not given."""
    verify: Literal["structure", "full", "none"] = "structure"
    """structure checks keys, shapes, types and, reading the files again, their hashes, in little memory; full also
    compares contents, reloads in stock transformers and compares logits."""


class DistillConfig(Config):
    """Sequence-level knowledge distillation: the teacher translates the training audio."""

    ADDED_LATER = frozenset({"beams", "untranslated"})
    DECIDES_NOTHING = frozenset({"device"})

    langs: Langs
    """Target languages."""
    splits: tuple[Literal["train", "select"], ...] = ("train",)
    """Splits to translate; `test` is never one of them, and `tune` learns `train` alone."""
    limit: Positive | None = None
    """Translate so many segments of each split, spread evenly; all if not given."""
    untranslated: bool = False
    """Translate segments that have no reference, too: speech that nobody has translated teaches what the teacher says of it."""
    batch_size: Positive = 32
    """Segments translated at once."""
    hypotheses: Annotated[int, Field(ge=1, le=16)] = 1
    """Learn from so many of the teacher's translations of a segment: the best of the search that are not dropped."""
    beams: Annotated[int, Field(ge=1, le=16)] | None = None
    """Width of the teacher's beam search; as many as `hypotheses` if not given. 1 is greedy."""
    max_length_ratio: Annotated[float, Field(gt=1)] = 2.0
    """Drop a translation whose length in characters is more than so many times the reference's, or less than its inverse."""
    min_score: Annotated[float, Field(ge=0, le=100)] = 5.0
    """Drop a translation whose sentence score in the selection metric is below this: a wrong one."""
    logits: Annotated[int, Field(ge=0, le=256)] = 0
    """Also keep so many of the teacher's likeliest tokens at every position, with their probabilities, for `tune --logit-weight`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the teacher."""
    device: str = "auto"
    """cpu, cuda or auto."""
    seed: Seed = 0
    """Kept with the artefact; translation leaves nothing to chance."""

    @property
    def width(self) -> int:
        """Beams of the teacher's search."""
        return self.beams or self.hypotheses

    @model_validator(mode="after")
    def _as_wide_as_what_it_keeps(self) -> Self:
        if self.width < self.hypotheses:
            raise ValueError(f"{self.hypotheses} hypotheses need as many beams, not {self.width}")
        return self


class TuneConfig(AdapterConfig):
    """Tuning the pruned model on references and the teacher's translations."""

    ADDED_LATER = frozenset({"weights"})

    method: Literal["qlora", "lora", "full"] = "qlora"
    """qlora trains an adapter over NF4 weights, lora over plain ones; full trains all but the audio tower (and images' parts) and writes a student."""
    logit_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss that is the divergence from the teacher's distribution; needs translations made with `--logits`."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward covers all that the teacher thinks likely; reverse keeps to what it thinks likeliest."""
    patience: Positive | None = 3
    """Stop after so many scores in a row that are no better than the best."""
    precision: Arithmetic = "auto"
    """Arithmetic: bfloat16 is autocast, and frozen weights are then kept in bfloat16 too; auto takes it where the device has units for it, else float32."""
    weights: Precision = "float32"
    """With method full, how weights and optimiser state are kept; bfloat16 takes half the memory and learns less finely."""

    @model_validator(mode="after")
    def _keeps_what_it_trains(self) -> Self:
        if self.weights == "bfloat16" and self.method != "full":
            raise ValueError(
                f"weights in bfloat16 are for method full; {self.method} trains an adapter in float32"
            )
        _check_weights(self.weights, self.precision)
        return self
