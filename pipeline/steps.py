"""One step: a stage applied to its inputs. The command line runs one, a recipe runs all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.config import (
    ImportanceBenchConfig,
    LatencyConfig,
    LongformConfig,
    QualityConfig,
    ServeBenchConfig,
)
from compress.config import (
    DistillConfig,
    ImportanceConfig,
    PruneConfig,
    TeachConfig,
    TuneConfig,
)
from export.config import MergeConfig, PackageConfig
from halve import artefact, environment
from halve.artefact import Artefact
from halve.config import Config
from halve.errors import ArtefactError
from halve.importers import CorpusConfig, inputs_of, noted_of
from halve.models import local_model, resolve_model
from halve.progress import Progress

Model = str | Path


@dataclass(frozen=True)
class Step:
    """What to make, of what, and where."""

    stage: str
    kind: str
    out: Path
    config: Config
    inputs: tuple[Model, ...]
    work: Callable[[Progress], Artefact]
    lacks: Callable[[Path], bool] | None = None
    """Whether something that was asked for is wanting in what was made, and could be had by now."""
    roles: Mapping[str, Model] = field(default_factory=dict)
    """Inputs that could change places unseen, by the names that they have on record or the first word of these."""
    noted: Mapping[str, Any] = field(default_factory=dict)
    """What the stage puts on record beside its settings, and that must be the same."""

    @property
    def name(self) -> str:
        """The stage, and which of several where it makes more than one."""
        several = self.stage in ("package", "bench")
        return f"{self.stage} {self.out.name}" if several else self.stage


def corpus(config: CorpusConfig, source: str, out: Path) -> Step:
    """Imports a corpus."""

    def work(progress: Progress) -> Artefact:
        from halve.importers import run_corpus

        return run_corpus(config, source, out, progress)

    inputs = tuple(inputs_of(config, source).values())
    noted = noted_of(config, source)
    return Step("corpus", "corpus", out, config, inputs, work, noted=noted)


def teach(
    config: TeachConfig, model: Model, speech: Path, out: Path, states: Path | None = None
) -> Step:
    """Fine-tunes the base model."""

    def work(progress: Progress) -> Artefact:
        from compress.teach import run_teach

        return run_teach(config, resolve_model(model), speech, out, progress, states_dir=states)

    return Step("teach", "teacher", out, config, (model, speech), work)


def importance(config: ImportanceConfig, model: Model, speech: Path, out: Path) -> Step:
    """Ranks decoder layers."""

    def work(progress: Progress) -> Artefact:
        from compress.importance import run_importance

        return run_importance(config, resolve_model(model), speech, out, progress)

    return Step("importance", "importance", out, config, (model, speech), work)


def prune(config: PruneConfig, model: Model, plan: Path | None, out: Path) -> Step:
    """Cuts layers out."""

    def work(progress: Progress) -> Artefact:
        from compress.prune import run_prune

        return run_prune(config, resolve_model(model), plan, out, progress)

    return Step("prune", "pruned", out, config, (model, *([plan] if plan else [])), work)


def distill(
    config: DistillConfig, model: Model, speech: Path, out: Path, states: Path | None = None
) -> Step:
    """Has the teacher translate the training audio."""

    def work(progress: Progress) -> Artefact:
        from compress.distill import run_distill

        return run_distill(config, resolve_model(model), speech, out, progress, states_dir=states)

    return Step("distill", "translations", out, config, (model, speech), work)


def tune(
    config: TuneConfig,
    model: Model,
    speech: Path,
    translations: Path | None,
    out: Path,
    states: Path | None = None,
) -> Step:
    """Tunes the pruned model."""

    def work(progress: Progress) -> Artefact:
        from compress.tune import run_tune

        return run_tune(
            config,
            resolve_model(model),
            speech,
            translations,
            out,
            progress,
            states_dir=states,
        )

    inputs = (model, speech, *([translations] if translations else []))
    kind = "student" if config.method == "full" else "adapter"
    return Step("tune", kind, out, config, inputs, work)


def merge(
    config: MergeConfig,
    model: Model,
    adapter: Path,
    speech: Path | None,
    out: Path,
    others: Sequence[Path] = (),
) -> Step:
    """Merges an adapter, or the mean of several, into its base."""

    def work(progress: Progress) -> Artefact:
        from export.merge import run_merge

        base = resolve_model(model)
        return run_merge(config, base, adapter, speech, out, progress, others=others)

    # A fully tuned model is cast, not merged: nothing is chosen on the corpus.
    scored = config.onto == "auto" and not (adapter / "config.json").is_file()
    used = (speech,) if speech is not None and scored else ()
    roles = {"model": model} | ({} if others else {"adapter": adapter})
    inputs = (model, adapter, *others, *used)
    return Step("merge", "student", out, config, inputs, work, roles=roles)


def package(
    config: PackageConfig,
    model: Model,
    speech: Path | None,
    out: Path,
    texts: Sequence[Path] = (),
) -> Step:
    """Packages a student; of `texts` a trimmed vocabulary keeps the tokens."""

    def work(progress: Progress) -> Artefact:
        from export.package import run_package

        return run_package(config, resolve_model(model), speech, out, progress, texts=texts)

    inputs = (model, *([speech] if speech else []), *texts)
    return Step("package", "package", out, config, inputs, work)


def quality(
    config: QualityConfig,
    teacher: Model,
    students: Sequence[Model],
    speech: Path,
    out: Path,
    earlier: Sequence[Path] = (),
) -> Step:
    """Scores models; what `earlier` results hold of them is not translated again."""

    def work(progress: Progress) -> Artefact:
        from benchmarks.quality import run_quality

        return run_quality(
            config, teacher, list(students), speech, out, progress, earlier=list(earlier)
        )

    def lacks(made: Path) -> bool:
        from benchmarks.comet import lacks_comet

        return lacks_comet(config, made)

    scorers = [Path(path) for path in (config.comet_checkpoint, config.embedding_model) if path]
    inputs = (teacher, *students, speech, *scorers)
    roles = {"teacher": teacher}
    return Step("bench", "results", out, config, inputs, work, lacks, roles)


def longform(
    config: LongformConfig, hypotheses: Sequence[Path], references: Path, out: Path
) -> Step:
    """Scores whole recordings' translations."""

    def work(progress: Progress) -> Artefact:
        from benchmarks.longform import run_longform

        return run_longform(config, list(hypotheses), references, out)

    roles = {"references": references, "first": hypotheses[0]}
    return Step("bench", "results", out, config, (*hypotheses, references), work, roles=roles)


def latency(config: LatencyConfig, models: Sequence[Model], speech: Path, out: Path) -> Step:
    """Times models."""

    def work(progress: Progress) -> Artefact:
        from benchmarks.latency import run_latency

        return run_latency(config, list(models), speech, out, progress)

    once = {str(model): model for model in models}  # as the bench counts them
    roles = {f"model {place}": model for place, model in enumerate(once.values())}
    noted = environment.measured_on()
    return Step("bench", "results", out, config, (*models, speech), work, roles=roles, noted=noted)


def importance_bench(config: ImportanceBenchConfig, model: Model, speech: Path, out: Path) -> Step:
    """Times the importance search against the paper's procedure."""

    def work(progress: Progress) -> Artefact:
        from benchmarks.importance import run_importance_bench

        return run_importance_bench(config, model, speech, out, progress)

    noted = environment.measured_on()
    return Step("bench", "results", out, config, (model, speech), work, noted=noted)


def serve_bench(
    config: ServeBenchConfig, model: Model, teacher: Model | None, speech: Path, out: Path
) -> Step:
    """Drives the server with one client and with many."""

    def work(progress: Progress) -> Artefact:
        from benchmarks.serve import run_serve_bench

        return run_serve_bench(config, model, teacher, speech, out, progress)

    inputs = (model, *([teacher] if teacher else []), speech)
    roles, noted = {"model": model}, environment.measured_on()
    return Step("bench", "results", out, config, inputs, work, roles=roles, noted=noted)


def report(results: Sequence[Path], out: Path, speech: Path | None = None) -> Step:
    """Makes a report; with a corpus its page plays the worst segments."""

    def work(progress: Progress) -> Artefact:
        from benchmarks.report import run_report

        return run_report(list(results), out, progress, corpus=speech)

    shown = _shown(results)
    inputs = (*dict.fromkeys(shown.values()), *([speech] if speech else []))
    # Their order is that of the comparison: differences are the second's over the first's.
    noted = {"results": list(shown)}
    return Step("report", "report", out, Config(), inputs, work, noted=noted)


def _shown(results: Sequence[Path]) -> dict[str, Path]:
    """The artefacts that a report is made of, by label: a run's or an earlier report's are inside of it."""
    from benchmarks.gather import gather

    try:
        return {source.label: source.path for source in gather(results)[0]}
    except ArtefactError:  # what is still to be made, or what the report itself will refuse
        return {str(place): place for place in results}


def up_to_date(step: Step, fetch: bool = True) -> bool:
    """Whether the step's artefact is there and made of just these inputs, settings and code.

    A stage may note more than its settings and names its parents as it likes; inputs are told by
    their hashes.

    Args:
        fetch: gets a hub's model that is not here, to tell whether it is the one; without, it is not.
    """
    settings = step.config.model_dump(mode="json") | dict(step.noted)
    seed = int(settings.get("seed") or 0)
    # Also finishes a renaming that a kill cut short.
    if artefact.is_current(step.out, step.kind, settings, seed, {}):
        return not step.inputs
    if not (step.out / artefact.RECORD).is_file():
        return False
    made = artefact.read(step.out)
    parents = _parents(step, made, fetch) if made.kind == step.kind else None
    if parents is None:
        return False
    if step.config.differs_from(made.recipe):
        return False
    if any(made.recipe.get(key, value) != value for key, value in step.noted.items()):
        return False
    is_current = artefact.is_current(step.out, step.kind, made.recipe, made.seed, parents)
    return is_current and not (step.lacks is not None and step.lacks(step.out))


def _parents(step: Step, made: Artefact, fetch: bool) -> dict[str, Path] | None:
    """The step's inputs by the names that the record has for them; None where it was made of others."""
    places: dict[Model, Path] = {}
    for item in (*step.inputs, *step.roles.values()):
        place = _local(item, fetch)
        if place is None or not place.exists():
            return None
        places[item] = place
    hashes = {item: artefact.identity(place) for item, place in places.items()}
    if set(made.parents.values()) != set(hashes.values()):
        return None
    for role, item in step.roles.items():
        names = [name for name in made.parents if role in (name, name.split()[0])]
        recorded = {made.parents[name] for name in names}
        # Results of earlier versions name none.
        if recorded and recorded != {hashes[item]}:
            return None
    by_hash = {found: places[item] for item, found in hashes.items()}
    return {name: by_hash[found] for name, found in made.parents.items()}


def _local(item: Model, fetch: bool) -> Path | None:
    if isinstance(item, Path):
        return item
    return resolve_model(item) if fetch else local_model(item)


def carry_out(step: Step, progress: Progress) -> tuple[Artefact, bool]:
    """Runs a step unless it is up to date. Returns its artefact, and whether it ran."""
    if up_to_date(step):
        progress.message(f"{step.name}: up to date in {step.out}")
        return artefact.read(step.out, step.kind), False
    return step.work(progress), True
