"""The benches' settings. Imports nothing heavy: `halve --help` reads it."""

from typing import Annotated, Literal

from pydantic import Field

from benchmarks.peer_names import PeerName
from halve.config import Config, Seed

MOST_THREADS = 1024
"""More than any machine has cores for; ten times as many would only be started, one after the other."""
Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
Split = Literal["test", "select", "train"]


class QualityConfig(Config):
    """What `halve bench quality` measures."""

    ADDED_LATER = frozenset({"beams"})
    DECIDES_NOTHING = frozenset({"comet_checkpoint", "comet_python", "embedding_model"})
    """Paths: what lies there is an input, and told by its hash."""

    lang: str
    """Target language (de, zh, …)."""
    split: Split = "test"
    """Split of the corpus that is translated and scored."""
    limit: int | None = Field(default=None, ge=2)
    """Score only so many segments, evenly spaced; the result says that it is a subset."""
    batch_size: int = Field(default=16, ge=1)
    """Segments translated together; with more than one beam, on torch, beams of segments."""
    beams: int = Field(default=1, ge=1, le=16)
    """Every model translates with a beam search of this width; 1 is greedy, as the paper and as packages are checked."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each interval."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    controls: bool = True
    """Give the teacher another segment's audio and silence, or its text, as well: does it listen, or read?"""
    noise_db: float | None = None
    """Translate with pink noise of this signal-to-noise ratio in dB as well, with every model."""
    comet_checkpoint: str | None = None
    """A COMET model directory (hparams.yaml and checkpoints/model.ckpt) or its model.ckpt."""
    comet_python: str | None = None
    """Python of an environment that has unbabel-comet; the one of `halve doctor --install-comet` if not given."""
    comet_batch_size: int = Field(default=8, ge=1)
    """Segments that COMET scores together."""
    embedding_model: str | None = None
    """Directory of a text encoder: also report the cosine of hypotheses' and references' embeddings."""
    threads: Threads | None = None
    """Compute threads; all cores where not given."""


class LongformConfig(Config):
    """What `halve bench longform` measures."""

    lang: str
    """Language of the texts (de, zh, …)."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each interval."""
    seed: Seed = 0
    """Seed of the bootstrap."""


class LatencyConfig(Config):
    """What `halve bench latency` measures."""

    DECIDES_NOTHING = frozenset({"timeout_s"})

    lang: str
    """Target language (de, zh, …)."""
    threads: Threads = 1
    """Compute threads, the same for every model."""
    repeats: int = Field(default=10, ge=2)
    """Measured runs of each clip."""
    warmup: int = Field(default=2, ge=1)
    """Unmeasured runs of each clip before them."""
    split: Split = "test"
    """Split of the corpus that the clips are taken from."""
    short_s: float = Field(default=5.0, gt=0)
    """Length of the short clip: the segment nearest to it is taken."""
    long_s: float = Field(default=25.0, gt=0)
    """Length of the long clip: real segments joined with pauses up to it."""
    pause_s: float = Field(default=0.3, ge=0)
    """Silence between the joined segments of the long clip."""
    baseline: bool = True
    """Also run the stock transformers loop on the first model."""
    new_tokens: int | None = Field(default=None, ge=2)
    """Everything says exactly so many tokens of each clip, past any end; the clip's limit where None."""
    also_threads: tuple[Threads, ...] = ()
    """Further thread counts. Models are compared at `threads` with the better of all of the others'."""
    peers: tuple[PeerName, ...] = ()
    """Other runtimes to time on the first unquantised model's weights; they need --new-tokens."""
    peer_folder: str = "runs/peers"
    """Where peers keep converted weights, and environments made by benchmarks/peer_environments.sh."""
    seed: Seed = 0
    """Kept for the record; nothing here is left to chance."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """The longest one model may take."""


class ServeBenchConfig(Config):
    """What `halve bench serve` measures."""

    DECIDES_NOTHING = frozenset({"startup_s"})

    lang: str
    """Target language (de, zh, …)."""
    clients: int = Field(default=16, ge=2)
    """Clients that ask at the same time in the second regime; the first has one."""
    requests: int = Field(default=64, ge=4)
    """Measured requests of each regime; fewer where `regime_s` ends first."""
    regime_s: float = Field(default=120.0, gt=0)
    """After so long no new request is sent; those under way are finished."""
    warmup: int = Field(default=3, ge=1)
    """Unmeasured requests before each regime."""
    split: Split = "test"
    """Split of the corpus that the requests are taken from."""
    segments: int = Field(default=32, ge=2)
    """Distinct segments sent, evenly spaced over the split."""
    tie_gap: float = Field(default=1e-2, gt=0)
    """A text that differs first where the best two tokens were nearer than this is a near tie."""
    startup_s: float = Field(default=180.0, gt=0)
    """The longest a server may take until it is ready."""
    timeout_s: float = Field(default=300.0, gt=0)
    """The longest one request may take."""
    threads: Threads | None = None
    """Compute threads of each server; all cores where not given."""
    seed: Seed = 0
    """Kept for the record; nothing here is left to chance."""


class ImportanceBenchConfig(Config):
    """What `halve bench importance` measures."""

    lang: str
    """Target language (de, zh, …)."""
    segments: int | None = Field(default=None, ge=1)
    """Use so many `select` segments, evenly spaced; all where not given."""
    threads: Threads | None = None
    """Compute threads, the same for every method; all cores where not given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of every method."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory for the fast search's caches."""
    also: tuple[Literal["bounded", "racing"], ...] = ()
    """Further methods to time in the same run."""
    tie_gap: float = Field(default=1e-4, gt=0)
    """A segment that differs first where the best two logits were nearer than this is a near tie."""
    seed: Seed = 0
    """Kept for the record; nothing here is left to chance."""
