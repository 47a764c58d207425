"""Recipes: every one in the repository loads, and faults are named together."""

from pathlib import Path

import pytest

from halve.errors import ArtefactError, RecipeError
from halve.models import find_config, local_model
from pipeline.recipe import read_recipe
from tests.pipeline.conftest import ROOT

RECIPES = [ROOT / "demo" / "recipe.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_loads(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.importance is not None
    assert recipe.importance.lang == recipe.lang[0]
    assert recipe.tune is not None
    assert recipe.tune.langs == recipe.lang


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = read_recipe(ROOT / "recipes" / "qwen2-audio-7b-zh.yaml")
    assert recipe.base == "Qwen/Qwen2-Audio-7B-Instruct"
    assert (recipe.teach and (recipe.teach.epochs, recipe.teach.learning_rate)) == (3, 1e-5)
    assert recipe.importance and (recipe.importance.remove, recipe.importance.lang) == (8, "zh")
    assert recipe.tune and (recipe.tune.rank, recipe.tune.alpha, recipe.tune.rslora) == (
        64,
        128,
        True,
    )
    assert recipe.corpus.source.endswith("recipes/data")


def test_a_path_is_never_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder above, `teacher` of demo/recipe.yaml reads demo/teacher, which a hub could have, too."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "lang: de\nteacher: teacher\ncorpus: {source: data/talks, format: iwslt}\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "talks").mkdir(parents=True)
    recipe = read_recipe(Path("demo/recipe.yaml"))
    assert recipe.teacher == "./demo/teacher"
    assert recipe.corpus.source == "./demo/data/talks", "not what lies in the working directory"
    assert find_model_is_refused(str(recipe.teacher))
    assert find_model_is_refused(Path("demo/teacher"))


def find_model_is_refused(model: str | Path) -> bool:
    with pytest.raises(ArtefactError, match="no model directory"):
        find_config(model)
    return local_model(model) is None


FAULTY = """\
lang: de
teacher: here
teacher: there
importance: {remove: three, colour: blue}
tune:
  epochs: 0
  logit_weight: 0.5
distill:
  langs: [de, xx]
packages:
  - {target: onnx, precision: int3}
  - {target: onnx, precision: nf4}
"""


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "faulty.yaml"
    path.write_text(FAULTY)
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    assert "10 faults:" in str(error.value)
    for fault in (
        "line 3, teacher: given twice",
        "corpus: is missing",
        "line 4, importance.remove: ",
        "line 4, importance.colour: no such setting",
        "line 6, tune.epochs: ",
        "line 9, distill.langs: Unknown language 'xx'",
        "line 11, packages.0.precision: ",
        "line 4, importance ranks layers that no prune section removes",
        "line 7, tune.logit_weight needs the teacher's distributions",
        "line 12, packages: Target onnx has no precision nf4",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("- a\n- b\n", "no settings"),
        ("a: [", "not YAML"),
        ("lang: de\ncorpus: {source: x, format: tsv}\n", "teacher, or a base"),
        ("lang: de\nbase: x\ncorpus: {source: x, format: tsv}\n", "needs a teach"),
        (
            "lang: de\nteacher: x\nimportance: {remove: 1}\ncorpus: {source: x, format: tsv}\n",
            "prune",
        ),
        (
            "lang: de\nteacher: x\ndistill:\nbench:\n  quality:\ncorpus: {source: x, format: tsv}\n",
            r"(?s)line 3, distill: is empty; write \{\}.*line 5, bench.quality: is empty",
        ),
        (
            "lang: de\nteacher: x\nimportance: {remove: 2}\nprune: {layers: [3]}\n"
            "corpus: {source: x, format: tsv}\n",
            "prune.layers settles what goes",
        ),
        ("lang: de\nteacher: x\nprune: {}\ncorpus: {source: x, format: tsv}\n", "needs layers"),
        (
            "lang: de\nteacher: x\npackages: [{target: onnx, precision: nf4}]\n"
            "corpus: {source: x, format: tsv}\n",
            "packages: Target onnx has no precision nf4",
        ),
        (
            "lang: de\nteacher: x\npackages: [{vocab_texts: [more.txt]}]\ncorpus: {source: x, format: tsv}\n",
            "line 3, packages: vocab_texts without trim_vocab: true",
        ),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=fault):
        read_recipe(path)


def test_paths_start_at_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "recipe.yaml"
    (path.parent / "near" / "by").mkdir(parents=True)
    path.write_text("lang: de\nteacher: near/by\ncorpus: {source: ../talks, format: iwslt}\n")
    recipe = read_recipe(path)
    assert recipe.teacher == str(path.parent / "near" / "by")
    assert recipe.corpus.source == str(path.parent / ".." / "talks")
    packages = "packages: [{trim_vocab: true, vocab_texts: [more/de.txt, /more.txt]}]\n"
    path.write_text(
        f"lang: de\nteacher: some/one\ncorpus: {{source: /talks, format: iwslt}}\n{packages}"
    )
    assert read_recipe(path).packages[0].vocab_texts == (
        str(path.parent / "more" / "de.txt"),
        "/more.txt",
    )
    assert read_recipe(path).teacher == "some/one"
    assert read_recipe(path).corpus.source == "/talks"


WHOLE = """\
lang: {lang}
teacher: x
corpus: {{source: x, format: tsv, lang: [ZH, zh]}}
prune: {{layers: [3]}}
distill: {{langs: [DE, de-AT]}}
tune: {tune}
packages: [{{target: onnx, precision: int8, langs: {package}}}]
bench: {{quality: {quality}}}
"""


def whole(path: Path, **changes: str) -> Path:
    values = {"lang": "de", "tune": "{}", "package": "[de]", "quality": "{}"} | changes
    path.write_text(WHOLE.format(**values), encoding="utf8")
    return path


@pytest.mark.parametrize("lang", ["DE", "de-AT", "[de, de]", "[de_CH, DE]"])
def test_languages_are_known_by_their_codes(lang: str, tmp_path: Path) -> None:
    recipe = read_recipe(whole(tmp_path / "r.yaml", lang=lang, package="[ZH_cn]"))
    assert recipe.lang == ("de",)
    assert recipe.tune and recipe.tune.langs == ("de",)
    assert recipe.distill and recipe.distill.langs == ("de",)
    assert recipe.corpus.lang == ("zh",)
    assert recipe.packages[0].langs == ("zh",)
    assert recipe.bench.quality and recipe.bench.quality.lang == "de"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lang": "{de: 1}"}, "line 1, lang: .* no language code"),
        ({"lang": "5"}, "line 1, lang: '5' is no language code"),
        ({"lang": "2020-01-01"}, "line 1, lang: '2020-01-01' is no language code"),
        ({"lang": "no"}, "line 1, lang: 'False' is no language code"),
        ({"package": "[tlh]"}, "line 7, packages.0.langs: Unknown language 'tlh'"),
        ({"quality": "{lang: tlh}"}, "line 8, bench.quality.lang: Unknown language 'tlh'"),
        ({"quality": "{split: tset}"}, "line 8, bench.quality.split: .*tset"),
        ({"tune": "{logit_weight: 0.5}"}, "logit_weight needs .*logits"),
        ({"quality": "&a {x: *a}"}, "contains itself"),
        ({"quality": "[" * 2000 + "]" * 2000}, "nested too deeply"),
    ],
)
def test_faults_inside_of_sections(changes: dict[str, str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=fault):
        read_recipe(whole(tmp_path / "r.yaml", **changes))


def test_one_is_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "lang: de\nteacher: x\ncorpus: {source: x, format: tsv, lang: de}\n"
        "distill: {splits: train}\ntune: {langs: de}\n"
    )
    recipe = read_recipe(path)
    assert recipe.corpus.lang == recipe.tune.langs == ("de",)
    assert recipe.distill.splits == ("train",)
