"""The commands of `halve bench`."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.config import (
    ImportanceBenchConfig,
    LatencyConfig,
    LongformConfig,
    QualityConfig,
    ServeBenchConfig,
)
from pipeline import shell, steps
from pipeline.console import Result
from pipeline.option_types import Corpus, MaybeCorpus, Model, Out
from pipeline.options import command

bench = typer.Typer(
    help="Measures quality, latency, the importance search and the server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@command(bench, "quality", QualityConfig)
def bench_quality(
    config: QualityConfig,
    teacher: Annotated[str, typer.Option("--teacher", metavar="DIR|ID", help="The teacher.")],
    corpus: Corpus,
    students: Annotated[
        list[str] | None,
        typer.Option(
            "--students", metavar="DIR...", help="Students and packages to compare with it."
        ),
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            "--earlier",
            metavar="DIR...",
            help="Quality results whose translations of these models are taken over.",
        ),
    ] = None,
    out: Out = None,
) -> Result:
    """Scores a teacher and its students: BLEU, chrF, chrF++, TER, retention with its interval."""
    given = students or []
    place = shell.place(out, "quality", config, teacher, corpus, *given)
    step = steps.quality(config, teacher, given, corpus, place, earlier or [])
    return shell.bench(step, "quality.json")


@command(bench, "longform", LongformConfig)
def bench_longform(
    config: LongformConfig,
    hypotheses: Annotated[
        list[Path],
        typer.Option(
            "--hypothesis", metavar="FILE...", help="Translations of the whole recording, as text."
        ),
    ],
    references: Annotated[
        Path, typer.Option("--references", metavar="FILE", help="References, one segment a line.")
    ],
    out: Out = None,
) -> Result:
    """Scores translations of a whole recording: cuts them to fit the references' segments first."""
    place = shell.place(out, "longform", config, *hypotheses, references)
    return shell.bench(steps.longform(config, hypotheses, references, place), "longform.json")


class LatencyOptions(LatencyConfig):
    """`halve bench latency` finds out the language by itself."""

    lang: str = ""
    """Target language; without it, one that the first model was made for."""


@command(bench, "latency", LatencyOptions)
def bench_latency(
    config: LatencyOptions,
    models: Annotated[
        list[str], typer.Option("--models", metavar="DIR...", help="Models and packages to time.")
    ],
    corpus: MaybeCorpus = None,
    out: Out = None,
) -> Result:
    """Times models: load, first token, each token, real-time factor, peak memory."""
    speech = corpus or shell.demo_corpus()
    lang = config.lang or shell.language_of(Path(models[0]))
    settings = LatencyConfig.model_validate(config.model_dump() | {"lang": lang})
    place = shell.place(out, "latency", settings, speech, *models)
    return shell.bench(steps.latency(settings, models, speech, place), "latency.json")


@command(bench, "importance", ImportanceBenchConfig)
def bench_importance(
    config: ImportanceBenchConfig, model: Model, corpus: Corpus, out: Out = None
) -> Result:
    """Times a round of the exact search against the paper's one-by-one procedure."""
    place = shell.place(out, "bench-importance", config, model, corpus)
    return shell.bench(steps.importance_bench(config, model, corpus, place), "importance.json")


class ServeBenchOptions(ServeBenchConfig):
    """`halve bench serve` finds out the language by itself."""

    lang: str = ""
    """Target language; without it, one that the model was made for."""


@command(bench, "serve", ServeBenchOptions)
def bench_serve(
    config: ServeBenchOptions,
    model: Model,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="DIR|ID", help="Served by stock code, for comparison."),
    ] = None,
    corpus: MaybeCorpus = None,
    out: Out = None,
) -> Result:
    """Drives the server with one client and with many, and checks every text."""
    speech = corpus or shell.demo_corpus()
    lang = config.lang or shell.language_of(Path(model))
    settings = ServeBenchConfig.model_validate(config.model_dump() | {"lang": lang})
    place = shell.place(out, "bench-serve", settings, model, teacher, speech)
    return shell.bench(steps.serve_bench(settings, model, teacher, speech, place), "serve.json")
