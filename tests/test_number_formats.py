"""Processors without units for bfloat16 compute in float32, unless they are told otherwise."""

import copy
import math
from pathlib import Path

import pytest
import torch

from compress.config import TeachConfig, TuneConfig
from compress.gradients import settle, settled
from compress.tune import run_tune
from export.config import PackageConfig
from export.package import run_package
from export.runtime import open_translator
from halve import artefact, environment
from halve.arithmetic import roomy_dtype
from halve.models import load_model
from halve.progress import Progress
from halve.shards import half_bytes, tensor_shapes
from serve.models import OVERHEAD, find_models
from serve.settings import ServeSettings
from tests import tiny
from tests.importing import Heard


class Told(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class Warned(Progress):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(params=[True, False], ids=["with units", "without"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this processor is taken to have units for bfloat16."""
    monkeypatch.setattr(environment, "computes_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.fixture(scope="module")
def package(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its decoder in NF4."""
    config = PackageConfig(target="checkpoint", precision="nf4", langs=("de",))
    return run_package(config, tiny_model, None, tmp_path_factory.mktemp("made") / "nf4").path


def test_this_processor_says_what_its_flags_say() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert environment.computes_bfloat16("cpu")
    if " avx2 " in flags and "avx512" not in flags and "avx_ne_convert" not in flags:
        assert not environment.computes_bfloat16("cpu")


def test_weights_that_would_not_fit_twice_stay_as_they_are(units: bool) -> None:
    assert environment.quick_dtype("cpu", 10) == ("bfloat16" if units else "float32")
    assert environment.quick_dtype("cpu", environment.memory_bytes()) == "bfloat16"


def test_qlora_computes_in_what_the_processor_has(
    units: bool, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    progress = Told()
    config = TuneConfig(langs=("de",), rank=4, max_steps=2, batch_size=4, select_segments=0)
    tuned = run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "adapter", progress)
    assert tuned.extra["arithmetic"] == ("bfloat16" if units else "float32")
    assert any("float32" in line for line in progress.messages) != units
    asked = config.model_copy(update={"precision": "bfloat16"})
    forced = run_tune(asked, tiny_model, tiny_corpus, None, tmp_path / "forced")
    assert forced.extra["arithmetic"] == "bfloat16"
    assert artefact.read(tuned.path).recipe["precision"] == "auto"


def test_what_is_asked_for_is_computed_in(units: bool, tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype="float32", quantization="nf4").model
    formats = {each.compute_dtype for each in model.modules() if hasattr(each, "compute_dtype")}
    assert formats == {torch.float32}


def test_a_run_that_goes_on_elsewhere_keeps_its_format(tmp_path: Path) -> None:
    warned = Warned()
    assert settled("bfloat16", tmp_path, warned) == "bfloat16", "nothing is begun yet"
    settle("float32", tmp_path)
    assert settled("float32", tmp_path, warned) == "float32" and not warned.warnings
    assert settled("bfloat16", tmp_path, warned) == "float32"
    assert "goes on in float32" in warned.warnings[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 8, "dropout": 0.1}, "rank, dropout: an adapter's"),
        ({"weights": "bfloat16", "precision": "float32"}, "compute in bfloat16"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TeachConfig.model_validate({"langs": ["de"], "method": "full", **settings})


def test_a_4_bit_package_computes_in_what_the_processor_has(units: bool, package: Path) -> None:
    clips = [tiny.tone(1.2, number) for number in range(3)]
    translator = open_translator(package, device="cpu")
    assert all(row.tokens for row in translator.translate(clips, "de", limits=[6] * 3))
    speech = translator.speech
    layer = speech.part(speech.family.layers)[0].mlp.up_proj
    states = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = layer(states)
        from bitsandbytes.functional import dequantize_4bit

        state = copy.deepcopy(layer.weight.quant_state)
        state.dtype = torch.float32
        weight = dequantize_4bit(layer.weight.data, state)
        off = float((found - states @ weight.T).abs().max())
    assert (off < 1e-5) != units, off


def test_asked_for_a_type_a_package_takes_it(package: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        translator = open_translator(package, device="cpu", dtype=dtype)
        assert translator.speech.model.lm_head.weight.dtype == getattr(torch, dtype)


def test_the_server_reckons_with_widened_weights(units: bool, package: Path) -> None:
    (model,) = find_models(ServeSettings(models=(str(package),))).values()
    stored = sum(f.stat().st_size for f in package.glob("*.safetensors"))
    half = half_bytes(package)
    kinds = {kind for _, kind in tensor_shapes(package).values()}
    assert kinds > {"BF16"} and 0 < half < stored
    assert model.size_bytes == int((stored + (0 if units else half)) * OVERHEAD)


def test_loading_a_model_in_bfloat16_is_still_what_is_asked_for(tiny_model: Path) -> None:
    assert load_model(tiny_model, dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_package_is_never_computed_in_less_than_it_stores(
    units: bool, precision: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = PackageConfig(target="checkpoint", precision=precision, langs=("de",))
    made = run_package(config, tiny_model, None, tmp_path / precision).path
    in_half = precision == "bf16" and units
    translator = open_translator(made, device="cpu")
    wanted = torch.bfloat16 if in_half else torch.float32
    assert translator.speech.model.lm_head.weight.dtype == wanted


def test_a_model_that_would_not_fit_in_float32_computes_in_bfloat16(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Heard()
    assert roomy_dtype(tiny_model, "cpu", told) == "float32" and not told.warnings
    needed = sum(4 * math.prod(shape) for shape, _ in tensor_shapes(tiny_model).values())
    monkeypatch.setattr(environment, "memory_bytes", lambda: needed)  # a fifth is for other things
    assert roomy_dtype(tiny_model, "cpu", told) == "bfloat16"
    assert "computes in bfloat16" in told.warnings[0]
    translator = open_translator(tiny_model, device="cpu")
    assert translator.speech.dtype == "bfloat16"
    assert open_translator(tiny_model, device="cpu", dtype="float32").speech.dtype == "float32"
