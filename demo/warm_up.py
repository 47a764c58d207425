"""Text warm-up of the demo's decoder: it learns to translate before it learns to listen.

The English *text* stands in the audio slot of the very prompts of the speech task; the loss is on
the translation alone. Three ways to get more out of two CPU cores, none of which changes the
mathematics of a row:

- the constant start of the prompt is run once a batch, and its keys and values are shared by all rows;
- the tasks of one sentence (German, Chinese, now and then the transcript) share its English: they are
  branches behind a common trunk (demo/packed_rows.py);
- weights are copies of float32 masters, in bfloat16 where the processor has units for it, and the head runs
  on target positions only.

Run through `python -m demo.build_teacher`. Killed, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from demo.build_teacher import read_sentences
from demo.orthogonal import use_float32
from demo.packed_rows import PADDING, Packer, Row, batches_of, branch_mask
from halve.environment import computes_bfloat16, quick_dtype


@dataclass(frozen=True)
class WarmUpRecipe:
    """The schedule. It ends at `steps` or after `minutes` of wall clock, whichever comes first."""

    steps: int = 481
    minutes: float = 240.0
    batch_tokens: int = 5000
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 0.02
    ramp_steps: int = 60
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    transcribe_share: float = 0.1
    more_text_share: float = 0.5
    seed: int = 0
    workers: int = 2
    checkpoint_every_s: float = 180.0
    validate_every_s: float = 600.0
    validation_segments: int = 200


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag a field of WarmUpRecipe, the field's default its default."""
    for field in fields(WarmUpRecipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)


def recipe_of(options: argparse.Namespace) -> WarmUpRecipe:
    """The recipe that the flags of `add_options` describe."""
    return WarmUpRecipe(
        **{field.name: getattr(options, field.name) for field in fields(WarmUpRecipe)}
    )


def epoch_batches(
    packer: Packer, sentences: list[dict[str, str]], recipe: WarmUpRecipe, epoch: int
) -> list[list[Row]]:
    """The batches of one epoch, a function of the recipe's seed and the epoch alone."""
    generator = random.Random(f"{recipe.seed}-{epoch}")
    rows = []
    for sentence in sentences:
        langs = [lang for lang in ("de", "zh") if lang in sentence]
        if generator.random() < recipe.transcribe_share:
            langs.append("en")
        rows.append(packer.pack_row(sentence, langs))
    return batches_of(rows, recipe.batch_tokens, generator)


def batch_loss(
    model: Qwen2ForCausalLM, prefix: list[int], rows: list[Row], label_smoothing: float
) -> Tensor:
    """Cross-entropy, summed over the target tokens of a batch."""
    length = max(len(row.tokens) for row in rows)

    def padded(name: str, filler: int) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([value + [filler] * (length - len(value)) for value in values])

    labels = padded("labels", -100)
    cache = DynamicCache(config=model.config)
    model.model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
    shared = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        shape = (len(rows), -1, -1, -1)
        shared.update(layer.keys.expand(shape), layer.values.expand(shape), index)
    # Eager attention, which wants zeros and minus infinities: over rows this short it is a third faster,
    # backward included, than the fused kernel with a mask.
    seen = branch_mask(padded("branches", PADDING), len(prefix))
    hidden = model.model(
        input_ids=padded("tokens", 0),
        position_ids=padded("positions", 0) + len(prefix),
        attention_mask=torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, -math.inf),
        past_key_values=shared,
        use_cache=True,
    ).last_hidden_state
    wanted = labels != -100
    loss: Tensor = SmoothedCrossEntropy.apply(
        hidden[wanted], model.lm_head.weight, labels[wanted], label_smoothing
    )
    return loss


class SmoothedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy with smoothed labels, of hidden states (tokens, width) and a head (vocabulary, width).

    The gradient of the logits is made in place where they stand: they are the largest tensors of a step.
    """

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, head: Tensor, labels: Tensor, smoothing: float
    ) -> Tensor:
        """The loss; see the class."""
        logits = (hidden @ head.T).float()
        places = labels[:, None]
        own = logits.gather(1, places)
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        loss = (normaliser - (1 - smoothing) * own).sum() - smoothing * logits.mean(dim=1).sum()
        gradient = logits.sub_(normaliser).exp_().sub_(smoothing / logits.shape[1])
        gradient.scatter_add_(1, places, torch.full_like(own, smoothing - 1))
        context.save_for_backward(hidden, head, gradient.to(hidden.dtype))
        return loss

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of hidden states and head."""
        hidden, head, gradient = context.saved_tensors
        scaled = gradient * outer[0].to(gradient.dtype)
        return scaled @ head, scaled.T @ hidden, None, None


class SharedWeights:
    """Weights that all worker processes see: float32 masters and the model made of them.

    Each worker leaves its gradients in a buffer of its own, and each parameter has one worker that
    updates it. Muon moves the matrices of the layers, AdamW the rest (embeddings, head, norms, biases).
    """

    def __init__(self, config: Qwen2Config, workers: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Qwen2ForCausalLM(config)
        self.model.set_attn_implementation("eager")
        self.masters = {n: p.detach().clone().share_memory_() for n, p in self.named()}
        self.gradients = [
            {name: torch.zeros_like(value).share_memory_() for name, value in self.masters.items()}
            for _ in range(workers)
        ]
        # What worker 0 tells the others before each step: elapsed seconds, save now (0 or 1).
        self.signal = torch.zeros(2, dtype=torch.float64).share_memory_()
        self.losses = torch.zeros(workers, dtype=torch.float64).share_memory_()
        self.model.to(getattr(torch, quick_dtype("cpu"))).share_memory().train()

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by name."""
        return self.model.named_parameters()

    def owned(self, worker: int) -> list[str]:
        """Names of the parameters that `worker` updates: every second one of each kind and size."""
        names = sorted(self.masters, key=lambda name: (self.masters[name].shape, name))
        return names[worker :: len(self.gradients)]

    def leave_gradients(self, worker: int) -> None:
        """Moves the model's gradients, as this worker has them, to its buffer."""
        for name, parameter in self.named():
            if parameter.grad is not None:
                self.gradients[worker][name].copy_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def publish(self, names: list[str]) -> None:
        """Copies masters into the model's weights."""
        weights = dict(self.named())
        for name in names:
            weights[name].copy_(self.masters[name])


class Updater:
    """One worker's optimizers, for the parameters it owns."""

    def __init__(self, weights: SharedWeights, worker: int, recipe: WarmUpRecipe) -> None:
        self.weights = weights
        self.names = weights.owned(worker)
        matrices = [n for n in self.names if ".layers." in n and weights.masters[n].dim() == 2]
        others = [name for name in self.names if name not in matrices]
        if not computes_bfloat16("cpu"):
            use_float32()
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [weights.masters[name] for name in others],
                lr=recipe.learning_rate,
                betas=(0.9, 0.98),
                weight_decay=recipe.weight_decay,
            ),
            torch.optim.Muon(
                [weights.masters[name] for name in matrices],
                lr=recipe.matrix_learning_rate,
                weight_decay=recipe.weight_decay,
            ),
        ]
        self.peaks = [recipe.learning_rate, recipe.matrix_learning_rate]

    def step(self, rate: float) -> None:
        """One update with `rate` times the peak learning rates.

        The gradients are not clipped: neither rule's step grows with the gradient's length.
        """
        for name in self.names:
            parts = [buffer[name] for buffer in self.weights.gradients]
            self.weights.masters[name].grad = torch.stack(parts).sum(dim=0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        self.weights.publish(self.names)

    def state(self) -> list[dict[str, Any]]:
        """State of both optimizers."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Goes back to a `state()`."""
        for optimizer, kept in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(kept)


def rate_at(recipe: WarmUpRecipe, step: int, elapsed_s: float) -> float:
    """Fraction of the peak learning rate: a short ramp, then linear down to nothing at the end."""
    done = max(step / recipe.steps, elapsed_s / (60 * recipe.minutes))
    return min(1.0, (step + 1) / recipe.ramp_steps) * max(0.0, 1.0 - done)


@torch.no_grad()
def translate(
    model: Qwen2ForCausalLM, packer: Packer, sentences: list[dict[str, str]], lang: str
) -> list[str]:
    """Greedy translations of the English text, by stock generate() on left-padded rows."""
    prompts = [packer.prefix + packer.prompt(sentence, lang) for sentence in sentences]
    batch = packer.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model.eval()
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=packer.end,
        pad_token_id=packer.tokenizer.pad_token_id,
    )
    model.train()
    answers = tokens[:, batch["input_ids"].shape[1] :]
    texts: list[str] = packer.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def validate(model: Qwen2ForCausalLM, packer: Packer, sentences: list[dict[str, str]]) -> str:
    """Loss, BLEU and chrF++ (chrF for Chinese) on unseen sentences, in one line, with an example."""
    rows = [packer.pack_row(sentence, ["de", "zh"]) for sentence in sentences]
    targets = sum(label != -100 for row in rows for label in row.labels)
    with torch.no_grad():
        loss = sum(
            batch_loss(model, packer.prefix, rows[start : start + 50], 0.0).item()
            for start in range(0, len(rows), 50)
        )
    parts = [f"select loss {loss / targets:.3f}"]
    for lang, tokenize, word_order in (("de", "13a", 2), ("zh", "zh", 0)):
        hypotheses = translate(model, packer, sentences, lang)
        references = [[sentence[lang] for sentence in sentences]]
        bleu = BLEU(tokenize=tokenize).corpus_score(hypotheses, references).score
        chrf = CHRF(word_order=word_order).corpus_score(hypotheses, references).score
        parts.append(f"{lang} BLEU {bleu:.1f} chrF{'+' * word_order} {chrf:.1f} | {hypotheses[5]}")
    return " | ".join(parts)


def load_decoder(work_dir: Path) -> dict[str, Tensor] | None:
    """float32 weights of the last checkpoint under Qwen2ForCausalLM's names; None if there is none."""
    path = work_dir / "warmup" / "checkpoint.pt"
    if not path.is_file():
        return None
    masters: dict[str, Tensor] = torch.load(path, weights_only=True)["masters"]
    return masters


def _log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def _stream(
    packer: Packer,
    sentences: list[dict[str, str]],
    more: list[dict[str, str]],
    recipe: WarmUpRecipe,
    skip: int,
) -> Iterator[list[Row]]:
    """Batches without end; the first `skip` of them were trained on before a restart.

    Each epoch has all `sentences`, and `more_text_share` of `more`, drawn anew.
    """
    epoch = 0
    while True:
        draw = random.Random(f"{recipe.seed}-more-{epoch}")
        drawn = [each for each in more if draw.random() < recipe.more_text_share]
        for rows in epoch_batches(packer, sentences + drawn, recipe, epoch):
            if skip > 0:
                skip -= 1
                continue
            yield rows
        epoch += 1


class WarmUp:
    """One worker's loop; worker 0 also keeps the clock, the log, the checkpoints and the scores.

    Two processes of one thread each are faster than one of two threads wherever other programs run
    on the same cores: they meet twice a step, not at every operation.
    """

    def __init__(
        self,
        worker: int,
        weights: SharedWeights,
        barrier: Barrier,
        packer: Packer,
        text_paths: Sequence[Path],
        checkpoint: Path,
        recipe: WarmUpRecipe,
    ) -> None:
        self.worker, self.weights, self.barrier = worker, weights, barrier
        self.packer, self.recipe, self.checkpoint = packer, recipe, checkpoint
        self.sentences = read_sentences(text_paths[:1], "train")
        self.more = read_sentences(text_paths[1:], "train")
        self.unseen = read_sentences(text_paths, "select")[: recipe.validation_segments]
        self.updater = Updater(weights, worker, recipe)
        self.step, self.elapsed_s, self.tokens = 0, 0.0, 0
        self.signal = weights.signal

    def _own_checkpoint(self) -> Path:
        return self.checkpoint.with_name(f"optimizer-{self.worker}.pt")

    def resume(self) -> None:
        """Goes back to the last checkpoint, if there is one whose files belong together."""
        if not self.checkpoint.is_file():
            return
        kept = torch.load(self.checkpoint, weights_only=True)
        own = torch.load(self._own_checkpoint(), weights_only=True)
        if own["step"] != kept["step"]:
            raise RuntimeError(f"{self.checkpoint.parent} was cut while it was written; delete it")
        self.updater.load(own["optimizers"])
        self.step, self.elapsed_s = int(kept["step"]), float(kept["elapsed_s"])
        for name in self.updater.names:
            self.weights.masters[name].copy_(kept["masters"][name])
        self.weights.publish(self.updater.names)
        self.barrier.wait()

    def save(self) -> None:
        """Writes this worker's part of a checkpoint."""
        own = {"optimizers": self.updater.state(), "step": self.step}
        _replace(own, self._own_checkpoint())
        if self.worker == 0:
            kept = {"masters": self.weights.masters, "step": self.step, "elapsed_s": self.elapsed_s}
            _replace(kept, self.checkpoint)
        self.barrier.wait()

    def train_step(self, rows: list[Row], rate: float) -> None:
        """This worker's share of a batch forward and backward, then its share of the update."""
        workers = len(self.weights.gradients)
        targets = sum(label != -100 for row in rows for label in row.labels)
        loss = batch_loss(
            self.weights.model,
            self.packer.prefix,
            rows[self.worker :: workers],
            self.recipe.label_smoothing,
        )
        (loss / targets).backward()
        self.weights.losses[self.worker] = loss.item() / targets
        self.weights.leave_gradients(self.worker)
        self.barrier.wait()
        self.updater.step(rate)
        self.step += 1
        self.tokens += sum(len(row.tokens) for row in rows)
        self.barrier.wait()

    def run(self) -> None:
        """Trains to the recipe's end."""
        self.resume()
        start_s = time.monotonic() - self.elapsed_s
        saved_s = validated_s = time.monotonic()
        smoothed = math.nan
        for rows in _stream(self.packer, self.sentences, self.more, self.recipe, self.step):
            if self.worker == 0:
                now_s = time.monotonic()
                save = now_s - saved_s > self.recipe.checkpoint_every_s
                saved_s = now_s if save else saved_s
                self.signal.copy_(torch.tensor([now_s - start_s, float(save)]))
                if now_s - validated_s > self.recipe.validate_every_s:
                    _log(validate(self.weights.model, self.packer, self.unseen))
                    validated_s = time.monotonic()
            self.barrier.wait()
            self.elapsed_s, save_now = self.signal.tolist()
            rate = rate_at(self.recipe, self.step, self.elapsed_s)
            if save_now or rate <= 0.0:
                self.save()
            if rate <= 0.0:
                break
            self.train_step(rows, rate)
            if self.worker == 0:
                loss = self.weights.losses.sum().item()
                smoothed = loss if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * loss
                if self.step % 10 == 0:
                    _log(
                        f"step {self.step} loss {smoothed:.3f} rate {rate:.3f} "
                        f"elapsed {self.elapsed_s:.0f} s tokens {self.tokens}"
                    )
        if self.worker == 0:
            text = validate(self.weights.model, self.packer, self.unseen)
            _log(f"done after {self.step} steps: {text}")


def _replace(state: dict[str, Any], path: Path) -> None:
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


def _work(worker: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    WarmUp(worker, *arguments).run()


def run(
    config: Qwen2Config,
    tokenizer: PreTrainedTokenizerFast,
    text_paths: Sequence[Path],
    work_dir: Path,
    recipe: WarmUpRecipe,
) -> None:
    """Trains the decoder to the recipe's end, from its last checkpoint if there is one."""
    checkpoint = work_dir / "warmup" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    _log(json.dumps(recipe.__dict__))
    weights = SharedWeights(config, recipe.workers, recipe.seed)
    barrier = multiprocessing.get_context("spawn").Barrier(recipe.workers)
    arguments = (weights, barrier, Packer(tokenizer), text_paths, checkpoint, recipe)
    torch.multiprocessing.spawn(_work, arguments, nprocs=recipe.workers)
