"""package.json: everything a runtime must know of a package, in plain numbers."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.blocks import rows_alone
from export.frontend import LogMel
from export.geometry import Geometry
from halve.errors import ArtefactError
from halve.json_files import read_json, write_json
from halve.languages import LANGUAGES

MANIFEST = "package.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The facts of one package."""

    target: str
    precision: str
    family: str
    languages: list[str]
    max_audio_s: float
    sample_rate_hz: int
    prompt: dict[str, tuple[list[int], list[int]]]
    """Token ids before and after the audio, by language code."""
    end_ids: list[int]
    files: list[str]
    logical_parameters: int
    decoder_layers: int
    parity: dict[str, Any] = field(default_factory=dict)
    onnx: dict[str, Any] | None = None
    """Of an ONNX package, and of a GGUF package, whose encoder is ONNX too: front_end, decoder, bits."""
    templates: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """Of a model that reads: the prompt's text before and after the source text, by the code of the language
    that it translates into, then by the source's."""
    begins: bool = False
    """Of a model that reads: whether its tokenizer must add its begin token to that."""
    suppressed_ids: list[int] = field(default_factory=list)
    """Tokens that the model's generation config forbids."""
    suppressed_first_ids: list[int] = field(default_factory=list)
    """Tokens that it forbids a translation to begin with."""

    @property
    def reads(self) -> str:
        """audio or text."""
        return "text" if self.templates else "audio"

    @property
    def front_end(self) -> LogMel:
        """Parameters of the audio front end."""
        return LogMel(**self._of_onnx("front_end"))

    @property
    def decoder(self) -> Geometry:
        """Sizes of the decoder."""
        facts = dict(self._of_onnx("decoder"))
        return Geometry(**{**facts, "rotary_frequencies": tuple(facts["rotary_frequencies"])})

    @property
    def encoder_bits(self) -> int:
        """Bits of the audio encoder's linear layers."""
        return int(self._of_onnx("bits").get("encoder", 32))

    @property
    def embedding_bits(self) -> int:
        """Bits that an embedding is stored in."""
        return int(self._of_onnx("bits")["embeddings"])

    @property
    def cache_bits(self) -> int:
        """Bits that a key or value is kept in."""
        return int(self._of_onnx("bits").get("cache", 32))

    @property
    def rows_alone(self) -> bool:
        """Whether the decoder's rows must be computed one by one (`export.blocks`)."""
        return self.target == "onnx" and rows_alone(self._of_onnx("bits"))

    @property
    def is_trimmed(self) -> bool:
        """Whether only some tokens of the tokenizer have embeddings and logits."""
        return bool(self._of_onnx("trimmed"))

    def _of_onnx(self, key: str) -> Any:
        if self.onnx is None:
            raise ArtefactError(
                f"This package is of target {self.target}", expected="target onnx or gguf"
            )
        return self.onnx[key]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes package.json."""
    write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, **asdict(manifest)})


def read_manifest(folder: Path, target: str | None = None) -> Manifest:
    """Reads package.json.

    Raises:
        ArtefactError: none there, of a newer halve, incomplete, or of another target.
    """
    facts = read_json(folder / MANIFEST)
    if not isinstance(facts, dict):
        raise ArtefactError(f"{folder / MANIFEST} is not an object", mend="make the package again")
    version = facts.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{folder / MANIFEST} has schema version {version}",
            expected=str(SCHEMA_VERSION),
            mend="make the package again with this halve, or use a newer one",
        )
    try:
        facts["prompt"] = {code: (ids[0], ids[1]) for code, ids in facts["prompt"].items()}
        facts["templates"] = _templates(facts)
        manifest = Manifest(**facts)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ArtefactError(f"{folder / MANIFEST} is incomplete ({error})") from None
    if target and manifest.target != target:
        raise ArtefactError(f"{folder} is of target {manifest.target}", expected=target)
    return manifest


def _templates(facts: dict[str, Any]) -> dict[str, dict[str, tuple[str, str]]]:
    """The prompts of a model that reads; `facts` loses what an earlier halve wrote in their place."""
    # It knew one prompt for each language translated into, whatever the source was in.
    single = facts.pop("template", {})
    by_source = {code: dict.fromkeys(LANGUAGES, parts) for code, parts in single.items()}
    return {
        code: {source: (parts[0], parts[1]) for source, parts in each.items()}
        for code, each in (by_source | facts.get("templates", {})).items()
    }
