"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector

from serve.pieces import Outcome, Piece, Watcher

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RATIOS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Watcher):
    """The counters of one server; labels take only values that the server itself chose."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "halve_requests",
            "Requests answered, by endpoint and HTTP status.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.running = Gauge("halve_requests_running", "Requests in the server.", registry=registry)
        self.latency = Histogram(
            "halve_request_seconds",
            "From a request's first byte to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "halve_first_token_seconds",
            "From a request's arrival to its first token (TTFT).",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queue = Gauge(
            "halve_queue_pieces", "Stretches of audio that wait.", ["model"], registry=registry
        )
        self.queue_wait = Histogram(
            "halve_queue_seconds",
            "Time that a stretch of audio waited for its batch.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "halve_batch_size",
            "Stretches of audio computed together, a step or a batch.",
            ["model"],
            buckets=SIZES,
            registry=registry,
        )
        self.audio = Counter(
            "halve_audio_seconds", "Audio translated.", ["model"], registry=registry
        )
        self.tokens = Counter("halve_tokens", "Tokens generated.", ["model"], registry=registry)
        self.rtf = Histogram(
            "halve_rtf",
            "Time in the engine over the length of the audio (real-time factor).",
            ["model"],
            buckets=RATIOS,
            registry=registry,
        )
        self.loaded = Gauge(
            "halve_model_loaded", "1 while a model is in memory.", ["model"], registry=registry
        )

    def queued(self, model: str, pieces: int) -> None:
        self.queue.labels(model).set(pieces)

    def stepped(self, model: str, pieces: int) -> None:
        self.batch_size.labels(model).observe(pieces)

    def translated(self, model: str, piece: Piece, outcome: Outcome) -> None:
        self.audio.labels(model).inc(piece.duration_s)
        self.tokens.labels(model).inc(len(outcome.translation.tokens))
        self.queue_wait.labels(model).observe(outcome.wait_s)
        if piece.duration_s:
            self.rtf.labels(model).observe(outcome.compute_s / piece.duration_s)
        if piece.is_first:
            self.first_token.labels(model).observe(outcome.first_token_s)

    def text(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        return generate_latest(self.registry)
