"""The training loss of one batch, as the tests of families take it."""

from torch import Tensor

from compress.collate import Batch
from compress.gradients import cross_entropy, target_logits
from halve.models import SpeechModel


def sequence_loss(
    speech: SpeechModel, batch: Batch, states: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy summed over the batch's target tokens; arguments as `target_logits` takes them."""
    return cross_entropy(target_logits(speech, batch, states), batch, label_smoothing)
