"""The command line. One function a command; nothing heavy is imported before a command needs it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.config import MOST_THREADS
from compress.config import (
    DistillConfig,
    ImportanceConfig,
    PruneConfig,
    TeachConfig,
    TuneConfig,
)
from export.config import MergeConfig, PackageConfig
from halve import environment
from halve.config import Config
from halve.errors import InputError
from halve.importers.base import CorpusConfig
from halve.languages import language
from pipeline import console, shell, steps
from pipeline.bench_cli import bench
from pipeline.console import Result
from pipeline.option_types import Corpus, MaybeCorpus, Model, Out, States
from pipeline.options import command
from serve.settings import ServeSettings

app = typer.Typer(
    name="halve",
    help="Makes speech-translation models small enough to deploy, and proves that they still translate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def halve(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Makes speech-translation models small enough to deploy, and proves that they still translate."""
    if version:
        Result(f"halve {environment.halve_version()}").show(as_json=False)
        raise typer.Exit


@command(app, "run")
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see recipes/ and docs/pipeline.md.")],
    out: Out = None,
    first: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help="Begin here: earlier stages are taken as they are."
        ),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="STAGE", help="End after this stage.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what each stage will cost here.")
    ] = False,
) -> Result:
    """All stages of a recipe; what is up to date is not made again, a stopped run goes on."""
    from pipeline import stages, summary
    from pipeline.recipe import read_recipe

    name = recipe.resolve().parent.name if recipe.stem == "recipe" else recipe.stem
    place = out or environment.runs_dir() / name
    whole = stages.Run(read_recipe(recipe), place)
    if out is None:
        shell.keep_apart(place, recipe, dry_run)
    if dry_run:
        planned, estimator = stages.plan(whole, first, last)
        return summary.of_plan(whole, planned, estimator)
    return summary.of_run(whole, stages.run_all(whole, first, last, console.progress()))


@command(app, "corpus", CorpusConfig)
def corpus(
    config: CorpusConfig,
    source: Annotated[
        str, typer.Argument(help="A directory, a TSV file, or (hf) the id of a data set.")
    ],
    out: Out = None,
) -> Result:
    """Imports speech with translations, checks every segment, and splits it."""
    return shell.do(steps.corpus(config, source, shell.place(out, "corpus", config, source)))


@command(app, "teach", TeachConfig)
def teach(
    config: TeachConfig, model: Model, corpus: Corpus, states_dir: States = None, out: Out = None
) -> Result:
    """Fine-tunes the whole base model on a corpus: the teacher."""
    place = shell.place(out, "teacher", config, model, corpus)
    return shell.do(steps.teach(config, model, corpus, place, states_dir))


@command(app, "importance", ImportanceConfig)
def importance(config: ImportanceConfig, model: Model, corpus: Corpus, out: Out = None) -> Result:
    """Finds the decoder layers whose absence costs least, and writes a plan."""
    place = shell.place(out, "importance", config, model, corpus)
    return shell.do(steps.importance(config, model, corpus, place))


@command(app, "prune", PruneConfig)
def prune(
    config: PruneConfig,
    model: Model,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="The plan.json of `halve importance`.")
    ] = None,
    out: Out = None,
) -> Result:
    """Cuts decoder layers out: an ordinary model with fewer layers."""
    if plan is not None and plan.is_dir():
        plan = plan / "plan.json"
    if plan is not None and not plan.is_file():
        raise InputError(f"{plan} does not exist", expected="the plan.json of `halve importance`")
    if plan is None and config.layers is None:
        raise InputError("Which layers?", expected="--plan DIR/plan.json or --layers 3,5,6")
    return shell.do(
        steps.prune(config, model, plan, shell.place(out, "pruned", config, model, plan))
    )


@command(app, "distill", DistillConfig)
def distill(
    config: DistillConfig, model: Model, corpus: Corpus, states_dir: States = None, out: Out = None
) -> Result:
    """Has the teacher translate the training audio, and joins that with the references."""
    place = shell.place(out, "translations", config, model, corpus)
    return shell.do(steps.distill(config, model, corpus, place, states_dir))


@command(app, "tune", TuneConfig)
def tune(
    config: TuneConfig,
    model: Model,
    corpus: Corpus,
    translations: Annotated[
        Path | None,
        typer.Option("--translations", metavar="DIR", help="What `halve distill` wrote."),
    ] = None,
    qlora: Annotated[bool, typer.Option("--qlora", help="The same as --method qlora.")] = False,
    states_dir: States = None,
    out: Out = None,
) -> Result:
    """Tunes a pruned model: an adapter, or (--method full) a whole student."""
    if qlora and config.method != "qlora":
        raise InputError(f"--qlora and --method {config.method} exclude each other")
    place = shell.place(out, "adapter", config, model, corpus, translations)
    return shell.do(steps.tune(config, model, corpus, translations, place, states_dir))


@command(app, "merge", MergeConfig)
def merge(
    config: MergeConfig,
    model: Model,
    adapter: Annotated[
        list[Path],
        typer.Option(
            "--adapter",
            metavar="DIR...",
            help="What `halve tune` wrote. Of several, as of several seeds, the mean is merged; of whole models, their mean is taken.",
        ),
    ],
    corpus: MaybeCorpus = None,
    out: Out = None,
) -> Result:
    """Merges an adapter into its base model: the student."""
    first, *others = adapter
    place = shell.place(out, "student", config, model, *adapter, *([corpus] if corpus else []))
    return shell.do(steps.merge(config, model, first, corpus, place, others))


@command(app, "package", PackageConfig)
def package(
    config: PackageConfig,
    model: Model,
    corpus: MaybeCorpus = None,
    vocab_texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--vocab-texts",
            metavar="FILE...",
            help="With --trim-vocab: more text in the target languages, a line each, whose tokens are kept.",
        ),
    ] = None,
    out: Out = None,
) -> Result:
    """Packages a student for one target, checked against the student first."""
    name = f"package-{config.target}-{config.precision}"
    texts = vocab_texts or []
    place = shell.place(out, name, config, model, *([corpus] if corpus else []), *texts)
    return shell.do(steps.package(config, model, corpus, place, texts))


@command(app, "report")
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Results, artefacts, whole runs or reports.")
    ],
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", metavar="DIR", help="Lets the page play the worst segments."),
    ] = None,
    out: Out = None,
) -> Result:
    """Makes a report in Markdown, HTML and JSON; compares where several are given."""
    given = [*results, *([corpus] if corpus else [])]
    place = shell.place(out, "report", Config(), *given)
    return shell.do(steps.report(results, place, corpus))


@command(app, "inspect")
def inspect(directory: Annotated[Path, typer.Argument(help="An artefact or a model.")]) -> Result:
    """Says what a directory is and what made it, and checks every hash."""
    from pipeline.inspect_artefact import inspect as look

    return look(directory)


@command(app, "plan")
def plan(
    model: Model,
    budget: Annotated[
        str, typer.Option("--budget", metavar="SIZE", help="Stored size, as 4GB or 500MB.")
    ],
    lang: Annotated[str | None, typer.Option("--lang", help="Target language.")] = None,
    importance: Annotated[
        Path | None,
        typer.Option("--importance", metavar="DIR", help="Ranks by what a search has measured."),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus", metavar="DIR", help="Also offers a vocabulary trimmed to its translations."
        ),
    ] = None,
    choice: Annotated[
        int | None, typer.Option("--choice", metavar="N", help="Which one to write; the first.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="RECIPE", help="Writes the choice as a recipe to run."),
    ] = None,
) -> Result:
    """Says which students fit into a size: layers kept, precisions, vocabulary; from the config alone."""
    from pipeline.budget import plan as fit

    return fit(model, budget, lang, importance, corpus, choice, write)


@command(app, "translate")
def translate(
    model: Model,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Audio files, one line each. For a text model: text files, one text a line; - or nothing: "
            "standard input."
        ),
    ] = None,
    lang: Annotated[str | None, typer.Option("--lang", help="Target language.")] = None,
    source_lang: Annotated[
        str, typer.Option("--source-lang", help="The language of the texts, for a text model.")
    ] = "en",
    segments: Annotated[
        Path | None,
        typer.Option(
            "--segments",
            metavar="YAML",
            help="A list of {wav, offset, duration}, one line each; or a directory of such lists, with a FILE_ORDER.",
        ),
    ] = None,
    input_dir: Annotated[
        Path | None,
        typer.Option("--input-dir", metavar="DIR", help="Where the audio of --segments lies."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Segments translated together.")] = 16,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Compute threads.")
    ] = None,
    beams: Annotated[
        int, typer.Option(min=1, max=64, help="Beam search; 1 is greedy, as scored.")
    ] = 1,
    stop_loops: Annotated[
        bool,
        typer.Option(
            "--stop-loops",
            help="Cut a translation that repeats itself, instead of at its token limit; scores are made without.",
        ),
    ] = False,
) -> Result:
    """Translates audio, one line a file or segment, or text, one line a line; UTF-8, in the order given.

    Lines are printed as they come. If one cannot be made, those before it stand (--json prints their list), and the exit
    code is 2.
    """
    from halve.models import family_of, resolve_model
    from pipeline import translate as translating

    if segments is not None and files:
        raise InputError("Files and --segments exclude each other")
    if input_dir is not None and segments is None:
        raise InputError("--input-dir is where the audio of --segments lies: name both, or neither")
    spoken = language(source_lang).code
    target = language(lang).code if lang else None
    how = (batch_size, threads, console.progress(), beams, stop_loops)
    reads = family_of(resolve_model(model)).reads
    if reads == "text" and segments is not None:
        raise InputError(
            f"{model} reads text, and --segments names audio", mend="name files of lines instead"
        )
    if reads == "text":
        texts = translating.lines_of_files(files or [], spoken)
        lines = translating.translate_lines(model, target, texts, *how)
        checked = translating.checked(lines, how[2], [len(source.text) for _, source in texts])
    else:
        pieces = (
            translating.pieces_of_files(files or [])
            if segments is None
            else translating.pieces_of_segments(segments, input_dir)
        )
        checked = translating.checked(translating.translate(model, target, pieces, *how), how[2])
    return console.Lines("", found=((line.text, vars(line)) for line in checked))


@command(app, "serve", ServeSettings)
def serve(config: ServeSettings) -> Result:
    """Serves models over HTTP, as OpenAI's audio API; stops on SIGTERM or Ctrl-C."""
    from serve.run import run_server

    run_server(config, console.progress())
    return Result("")


@command(app, "clean")
def clean(
    directory: Annotated[Path, typer.Argument(help="A run, or the directory of all runs.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
    keep_unfinished: Annotated[
        bool,
        typer.Option("--keep-unfinished", help="Not what a stopped run would go on from."),
    ] = False,
) -> Result:
    """Lists what can go and its size; nothing of a run that is under way."""
    from pipeline.clean import clean as find

    return find(directory, yes, keep_unfinished)


@command(app, "doctor")
def doctor(
    install_comet: Annotated[
        bool,
        typer.Option("--install-comet", help="First make the environment that COMET runs in."),
    ] = False,
) -> Result:
    """Says what this machine can run and what is missing."""
    if install_comet:
        from benchmarks.comet_environment import install

        install(progress=console.progress())
    from pipeline.doctor import examine

    return examine()


app.add_typer(bench, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    shell.run(app, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
