"""A whole run: the stages in their order, what each takes from those before it, and running them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export.config import MergeConfig, PackageConfig
from halve import artefact, environment
from halve.errors import HalveError, InputError
from halve.importers.base import CorpusConfig
from halve.models import read_config, resolve_model
from halve.progress import Progress
from pipeline import checks, steps
from pipeline.console import duration, size
from pipeline.costs import Cost, Estimator
from pipeline.recipe import Recipe, package_name
from pipeline.stage_costs import cost as cost_of
from pipeline.steps import Model, Step


@dataclass(frozen=True)
class Run:
    """A recipe and the directory that it fills; each property says where a stage leaves its work."""

    recipe: Recipe
    out: Path

    @property
    def corpus(self) -> Path:
        """The imported corpus."""
        return self.out / "corpus"

    @property
    def teacher(self) -> Model:
        """The model that is made small: taught here, or given."""
        if self.recipe.teach is not None:
            return self.out / "teacher"
        return _model(str(self.recipe.teacher))

    @property
    def pruned(self) -> Model:
        """The model with fewer layers; the teacher itself where no layer goes."""
        return self.out / "pruned" if self.recipe.prune is not None else self.teacher

    @property
    def translations(self) -> Path | None:
        """The teacher's translations, where there are any."""
        return self.out / "translations" if self.recipe.distill is not None else None

    @property
    def student(self) -> Model:
        """The model that is packaged and measured."""
        return self.out / "student" if self.recipe.tune is not None else self.pruned

    @property
    def states(self) -> Path:
        """The encoded audio, which distillation with logits and training share."""
        return self.out / "states"

    @property
    def packages(self) -> list[Path]:
        """The student's packages."""
        return [self.out / "packages" / package_name(one) for one in self.recipe.packages]

    @property
    def _merge_is_chosen(self) -> bool:
        """Whether the student's record holds the scores of both bases."""
        tune, merge = self.recipe.tune, self.recipe.merge
        return (
            tune is not None
            and tune.method != "full"
            and merge is not None
            and merge.onto == "auto"
        )

    @property
    def _is_copied(self) -> bool:
        """Whether what was tuned in full is gone, and the student, its copy, is there (`halve clean`)."""
        tune, student = self.recipe.tune, self.out / "student" / artefact.RECORD
        is_full = tune is not None and tune.method == "full"
        return is_full and student.is_file() and not (self.out / "adapter").exists()

    @property
    def results(self) -> list[Path]:
        """What the report shows."""
        bench = self.recipe.bench
        found = [
            *([self.out / "importance"] if self.recipe.importance else []),
            *([self.out / "adapter"] if self.recipe.tune and not self._is_copied else []),
            *([self.out / "student"] if self._merge_is_chosen else []),
            *self.packages,
            *([self.out / "results" / "quality"] if bench.quality else []),
            *([self.out / "results" / "latency"] if bench.latency else []),
        ]
        return found


def _model(text: str) -> Model:
    return text if not text.startswith((".", "/")) and not Path(text).exists() else Path(text)


def corpus(run: Run) -> Iterator[Step]:
    """Imports the speech and its translations."""
    section = run.recipe.corpus
    # Not the path that the recipe came by: the same files by another spelling are the same corpus.
    config = CorpusConfig.model_validate(section.model_dump(exclude={"source"}))
    yield steps.corpus(config, section.source, run.corpus)


def teach(run: Run) -> Iterator[Step]:
    """Fine-tunes the base model on the corpus."""
    if run.recipe.teach is not None:
        base = _model(str(run.recipe.base))
        yield steps.teach(run.recipe.teach, base, run.corpus, run.out / "teacher")


def importance(run: Run) -> Iterator[Step]:
    """Finds the layers that can go."""
    if run.recipe.importance is not None:
        yield steps.importance(
            run.recipe.importance, run.teacher, run.corpus, run.out / "importance"
        )


def prune(run: Run) -> Iterator[Step]:
    """Cuts them out."""
    if run.recipe.prune is not None:
        plan = run.out / "importance" / "plan.json" if run.recipe.prune.layers is None else None
        yield steps.prune(run.recipe.prune, run.teacher, plan, run.out / "pruned")


def distill(run: Run) -> Iterator[Step]:
    """Has the teacher translate the training audio."""
    if run.recipe.distill is not None:
        yield steps.distill(
            run.recipe.distill, run.teacher, run.corpus, run.out / "translations", run.states
        )


def tune(run: Run) -> Iterator[Step]:
    """Tunes the pruned model on references and translations."""
    if run.recipe.tune is not None:
        yield steps.tune(
            run.recipe.tune,
            run.pruned,
            run.corpus,
            run.translations,
            run.out / "adapter",
            run.states,
        )


def merge(run: Run) -> Iterator[Step]:
    """Merges the adapter: the student."""
    if run.recipe.tune is not None:
        config = run.recipe.merge or MergeConfig()
        in_4_bits = any(each.precision in ("nf4", "int4") for each in run.recipe.packages)
        if in_4_bits and "requantized" not in config.model_fields_set:
            # What was tuned on NF4 may lose its gain when it is merged and quantised again.
            config = config.model_copy(update={"requantized": config.onto == "auto"})
        # A model that was tuned in full is the student: nothing is chosen on the corpus.
        corpus = None if run.recipe.tune.method == "full" else run.corpus
        yield steps.merge(config, run.pruned, run.out / "adapter", corpus, run.out / "student")


def package(run: Run) -> Iterator[Step]:
    """Packages the student, each package checked against it."""
    for section, place in zip(run.recipe.packages, run.packages, strict=True):
        said = section.model_dump(exclude={"vocab_texts"}, exclude_unset=True)
        texts = [Path(text) for text in section.vocab_texts]
        yield steps.package(
            PackageConfig.model_validate(said), run.student, run.corpus, place, texts
        )


def bench(run: Run) -> Iterator[Step]:
    """Measures teacher, student and packages."""
    wanted = run.recipe.bench
    # Where nothing was pruned or tuned, the packages are all that stands beside the teacher.
    students = [*([run.student] if run.student != run.teacher else []), *run.packages]
    students = students or [run.student]
    results = run.out / "results"
    if wanted.quality is not None:
        yield steps.quality(wanted.quality, run.teacher, students, run.corpus, results / "quality")
    if wanted.latency is not None:
        models = [run.teacher, *students]
        yield steps.latency(wanted.latency, models, run.corpus, results / "latency")


def report(run: Run) -> Iterator[Step]:
    """Writes it all down."""
    if run.results:
        yield steps.report(run.results, run.out / "report", run.corpus)


STAGES: tuple[Callable[[Run], Iterator[Step]], ...] = (
    corpus,
    teach,
    importance,
    prune,
    distill,
    tune,
    merge,
    package,
    bench,
    report,
)


@dataclass(frozen=True)
class Planned:
    """A step of a run, with what it will cost here and whether it is done."""

    step: Step
    cost: Cost
    done: bool


def stage_names() -> list[str]:
    """The stages' names, in their order."""
    return [stage.__name__ for stage in STAGES]


def steps_between(run: Run, first: str | None, last: str | None) -> list[Step]:
    """The steps from one stage to another.

    Raises:
        InputError: no such stages, or an earlier stage whose artefact they read and that is not complete.
    """
    names = stage_names()
    for name in (first, last):
        if name is not None and name not in names:
            raise InputError(f"Unknown stage {name!r}", expected=f"one of {', '.join(names)}")
    start = names.index(first) if first else 0
    end = names.index(last) if last else len(names) - 1
    if start > end:
        raise InputError(f"--from {first} comes after --to {last}")
    chosen = [step for stage in STAGES[start : end + 1] for step in stage(run)]
    inputs = [Path(item) for step in chosen for item in step.inputs]
    read = {place for path in inputs for place in (path, *path.parents)}
    for stage in STAGES[:start]:
        for step in stage(run):
            # What only earlier stages read may be gone: `halve clean` takes it when the student is there.
            if step.out in read and not (step.out / artefact.RECORD).is_file():
                raise InputError(
                    f"{step.out} is missing, and --from {first} leaves out the stage that makes it",
                    mend=f"use --from {stage.__name__}, or no --from",
                )
    return chosen


def check_inputs(run: Run, chosen: list[Step]) -> None:
    """Refuses a run whose model or corpus is not there, or whose layers cannot go, before anything is done.

    What none of the chosen steps reads may be gone.

    Raises:
        InputError: the source of the corpus is missing, or texts for a trimmed vocabulary, or what a bench is given
            to score with, or layers that the model cannot do without, or a latency bench of a model that reads text.
        ArtefactError: the model is missing.
        FamilyError: an architecture that halve does not know.
    """
    section = run.recipe.corpus
    stages = {step.stage for step in chosen}
    if "corpus" in stages and section.format != "hf" and not Path(section.source).exists():
        raise InputError(
            f"The corpus source {section.source} does not exist",
            mend="correct `source` in the recipe (paths are relative to the recipe)",
        )
    if "package" in stages:
        checks.check_texts(run.recipe)
    if run.recipe.bench.quality is not None and "bench" in stages:
        from benchmarks.quality import check_config

        check_config(run.recipe.bench.quality)
    model = _model(str(run.recipe.teacher or run.recipe.base))
    if any(model in step.inputs for step in chosen):
        checks.check_fits(run.recipe, read_config(resolve_model(model)))


def plan(run: Run, first: str | None, last: str | None) -> tuple[list[Planned], Estimator]:
    """The steps with their costs, without running anything.

    Raises:
        InputError: no such stages, or something that the recipe's model or corpus cannot do.
    """
    estimator = Estimator(run)
    if estimator.config is not None:
        checks.check_fits(run.recipe, estimator.config)
    chosen = steps_between(run, first, last)
    checks.check_splits(chosen, run.corpus, estimator.speech)
    planned: list[Planned] = []
    for step in chosen:
        # What follows a step that must run is only known to be current once that has run.
        earlier = all(other.done for other in planned)
        planned.append(Planned(step, cost_of(estimator, step), earlier and _is_done(step)))
    return planned, estimator


def _is_done(step: Step) -> bool:
    try:
        return steps.up_to_date(step, fetch=False)
    except HalveError:  # an input that is not there yet
        return False


def run_all(run: Run, first: str | None, last: str | None, progress: Progress) -> list[Planned]:
    """Carries out the steps in their order, and says before each what it will cost."""
    planned = steps_between(run, first, last)
    check_inputs(run, planned)
    estimator = Estimator(run)
    checks.check_splits(planned, run.corpus, estimator.speech)
    if estimator.config is not None:
        checks.check_weights(estimator.config, [step for step in planned if not _is_done(step)])
    run.out.mkdir(parents=True, exist_ok=True)
    ran = []
    for step in planned:
        cost = cost_of(estimator, step)
        if steps.up_to_date(step):
            progress.message(f"{step.name}: up to date")
            ran.append(Planned(step, cost, True))
            continue
        progress.message(f"{step.name}: about {cost} -> {step.out}")
        _check_disk(run.out, cost, progress)
        step.work(progress)
        environment.release_gpu_memory()
        ran.append(Planned(step, cost, False))
        if step.stage == "corpus":
            estimator = Estimator(run)  # what was assumed is known now
            checks.check_splits(planned, run.corpus, estimator.speech)
    return ran


def _check_disk(out: Path, cost: Cost, progress: Progress) -> None:
    free = shutil.disk_usage(out).free
    if cost.disk_bytes is not None and cost.disk_bytes > free:
        progress.warn(
            f"{size(free)} are free in {out}, about {size(cost.disk_bytes)} will be written."
        )


def total(planned: list[Planned]) -> str:
    """What is left to do, in one line."""
    left = [one.cost for one in planned if not one.done]
    seconds = [cost.time_s for cost in left]
    if any(value is None for value in seconds):
        return "The whole time cannot be estimated: the model's config is not known."
    disk = sum(cost.disk_bytes or 0 for cost in left)
    return f"About {duration(sum(s or 0 for s in seconds))} and {size(disk)} of disk in all (estimates)."
