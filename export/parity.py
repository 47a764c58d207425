"""Whether a package translates as its student does.

A package that computes in float32 must give the student's greedy tokens, but for near ties between the
two best tokens, where rounding decides. A quantised one may differ; its score may not drop by more than
a stated amount.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.config import PackageConfig
from export.scoring import SelectSet
from halve import environment
from halve.arithmetic import roomy_dtype
from halve.errors import ParityError
from halve.families import Source
from halve.metrics import retention, score
from halve.models import load_model
from halve.progress import Advance, Progress
from halve.translate import TorchTranslator, Translation, Translator

NEAR_TIE_LOGITS = 1e-4
NEAR_TIE_SHARE = 0.01


def check_parity(
    config: PackageConfig,
    student: Path,
    open_package: Callable[[], Translator],
    sets: Sequence[SelectSet],
    progress: Progress,
) -> dict[str, Any]:
    """Compares a package with its student, up-cast to float32 if there is room for that, on `select`.

    Args:
        open_package: the package is closed again before the student is loaded: a GPU may hold one of the two.

    Returns:
        What package.json records: by language the scores, their difference with its interval, segments
        with other tokens; `passed`, and `forced` where a failed package is kept.

    Raises:
        ParityError: it failed and `config.force` is not set.
    """
    languages: dict[str, Any] = {}
    faults: list[str] = []
    total = 2 * sum(len(each.segments) for each in sets)
    with progress.task("package: compare with the student", total) as advance:
        said = _all_said(config, open_package, sets, advance)
        # Of a package in float32 the same tokens are asked: nothing less will do.
        exact = config.precision == "fp32"
        dtype = "float32" if exact else roomy_dtype(student, progress=progress)
        reference = TorchTranslator(load_model(student, dtype=dtype))
        for each in sets:
            languages[each.lang] = found = _compare(
                config, reference, said[each.lang], each, advance
            )
            faults += _faults(config, each.lang, found)
            advance(0, f"{each.lang}: {found['metric']} {found['difference']:+.2f}")
    reference.close()
    if faults and not config.force:
        raise ParityError(
            "; ".join(faults),
            expected="the student's tokens" if config.precision == "fp32" else "a smaller drop",
            mend="choose a higher precision; or raise max_drop or keep it with --force, for which it is not made again",
        )
    return {
        "reference": f"the student in {dtype}",
        "max_drop": config.max_drop,
        "languages": languages,
        "faults": faults,
        "passed": not faults,
        "forced": bool(faults),
    }


def _all_said(
    config: PackageConfig,
    open_package: Callable[[], Translator],
    sets: Sequence[SelectSet],
    advance: Advance,
) -> dict[str, list[Translation]]:
    """The package's translations by language."""
    package = open_package()
    try:
        return {each.lang: each.translate(package, config.batch_size, advance) for each in sets}
    finally:
        package.close()
        del package
        environment.release_gpu_memory()


def _compare(
    config: PackageConfig,
    reference: TorchTranslator,
    found: Sequence[Translation],
    each: SelectSet,
    advance: Advance,
) -> dict[str, Any]:
    expected = each.translate(reference, config.batch_size, advance)
    other = [
        index for index, pair in enumerate(zip(expected, found, strict=True)) if _differ(*pair)
    ]
    ties = []
    if config.precision == "fp32" or (config.target, config.precision) == ("gguf", "fp16"):
        ties = [_first_difference(reference, each, i, expected[i], found[i]) for i in other]
    near = [tie for tie in ties if tie["gap"] < NEAR_TIE_LOGITS]
    student_texts, package_texts = ([row.text for row in rows] for rows in (expected, found))
    scores = [
        score(each.metric, rows, each.references, each.lang)
        for rows in (student_texts, package_texts)
    ]
    kept = asdict(
        retention(
            each.metric, student_texts, package_texts, each.references, each.lang, seed=config.seed
        )
    )
    return {
        "segments": len(each.segments),
        "metric": each.metric,
        "signature": scores[0].signature,
        "student_score": scores[0].score,
        "package_score": scores[1].score,
        "difference": kept["difference"],
        "difference_low": kept["difference_low"],
        "difference_high": kept["difference_high"],
        "equal": len(each.segments) - len(other),
        "near_ties": near,
        "different": [tie for tie in ties if tie not in near],
    }


def _differ(expected: Translation, found: Translation) -> bool:
    return (expected.tokens, expected.stopped, expected.text) != (
        found.tokens,
        found.stopped,
        found.text,
    )


def _first_difference(
    reference: TorchTranslator,
    each: SelectSet,
    index: int,
    expected: Translation,
    found: Translation,
) -> dict[str, Any]:
    """Where two translations part, and how far apart the student's two best tokens are there."""
    shared = 0
    for one, other in zip(expected.tokens, found.tokens, strict=False):
        if one != other:
            break
        shared += 1
    gap = top_two_gap(reference, each.audio[index], each.lang, expected.tokens[:shared])
    return {"id": each.segments[index].id, "token": shared, "gap": gap}


def top_two_gap(
    translator: TorchTranslator, audio: Source, lang: str, tokens: Sequence[int]
) -> float:
    """The difference of the two highest logits after `tokens`, of what the model may say; infinite where it
    is no number."""
    import torch

    speech = translator.speech
    taken = translator.encode_all([audio])
    with torch.inference_mode():
        prompt = translator.inputs(taken[0], lang)
        ids = torch.tensor(list(tokens), dtype=torch.long, device=prompt.device)
        inputs = torch.cat([prompt, speech.family.embed(speech.model, ids)])[None]
        hidden = speech.part(speech.family.decoder)(
            **speech.family.decoder_inputs(speech.model, inputs), **speech.family.conditions(taken)
        ).last_hidden_state
        best = translator.logits(hidden[0, -1:], first=not tokens)[0].topk(2).values
    gap = float(best[0] - best[1])
    return gap if math.isfinite(gap) else math.inf


def _faults(config: PackageConfig, lang: str, found: dict[str, Any]) -> list[str]:
    if config.precision == "fp32" and config.target != "checkpoint":
        faults = []
        if found["different"]:
            first = found["different"][0]
            faults.append(
                f"{lang}: {len(found['different'])} of {found['segments']} segments have other tokens "
                f"(first {first['id']}, token {first['token']}, gap {first['gap']:.3g})"
            )
        if len(found["near_ties"]) > max(1, math.floor(NEAR_TIE_SHARE * found["segments"])):
            faults.append(
                f"{lang}: {len(found['near_ties'])} near ties in {found['segments']} segments"
            )
        return faults
    if found["difference"] >= -config.max_drop:
        return []
    return [
        f"{lang}: {found['metric']} {found['package_score']:.2f}, the student's is "
        f"{found['student_score']:.2f}: a drop of {-found['difference']:.2f} (95 % interval "
        f"{-found['difference_high']:.2f} to {-found['difference_low']:.2f}), more than {config.max_drop}"
    ]
