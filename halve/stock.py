"""Stock `generate` as halve means it everywhere: greedy, without what a release's own settings would add."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halve.families import Family


def greedy_config(family: Family, model: Any, limit: int, at_least: int | None = None) -> Any:
    """Stock generation settings of greedy decoding without any penalty, whatever the model's defaults.

    Args:
        limit: the most tokens that are said.
        at_least: goes on past every end token until so many are said.
    """
    import transformers

    settings: Any = transformers.GenerationConfig
    ends = family.end_ids(model)
    stored = model.generation_config.pad_token_id
    always, at_first = family.suppressed(model)
    return settings(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        min_new_tokens=at_least,
        eos_token_id=list(ends),
        pad_token_id=ends[0] if stored is None else stored,
        decoder_start_token_id=getattr(model.generation_config, "decoder_start_token_id", None),
        suppress_tokens=list(always) or None,
        begin_suppress_tokens=list(at_first) or None,
    )


@contextmanager
def generating(model: Any, settings: Any) -> Iterator[None]:
    """Replaces the model's generation settings: given as an argument they would be mixed with them."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before
