"""What the server measures, in Prometheus' text format, by model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openmythos.engine.engine import Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LOOPS = tuple(map(float, (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)))
GAUGES: Mapping[str, tuple[str, Callable[[Stats], float]]] = {
    "requests_running": ("Requests that are computed", lambda s: s.num_running),
    "requests_waiting": ("Requests that wait for room", lambda s: s.num_waiting),
    "pages_free": ("Pages of the cache that no request holds", lambda s: s.num_free_pages),
    "pages": ("Pages of the cache", lambda s: s.num_pages),
    "rows_per_step": ("Mean rows in a call of the core", lambda s: s.rows_per_step),
}
COUNTERS: Mapping[str, tuple[str, Callable[[Stats], float]]] = {
    "preemptions": ("Requests that gave up their pages", lambda s: s.num_preempted),
    "steps": ("Steps of the engine", lambda s: s.num_steps),
    "core_applications": ("Loops of single tokens", lambda s: s.core_applications),
    "prompt_tokens_read": (
        "Tokens of prompts that were computed",
        lambda s: s.num_prompt_tokens_read,
    ),
    "prompt_tokens_found": (
        "Tokens of prompts found in pages",
        lambda s: s.num_prompt_tokens_found,
    ),
}


@dataclass(frozen=True)
class ModelMetrics:
    """The counters and histograms of one model."""

    prompt_tokens: Counter
    new_tokens: Counter
    loops: Histogram
    first_token: Histogram
    inter_token: Histogram
    whole: Histogram
    finished: Mapping[str, Counter]


class Metrics:
    """Counters and histograms of all models; names begin with ``openmythos_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._stats: dict[str, Callable[[], Stats]] = {}

        def counter(name: str, what: str, *labels: str) -> Counter:
            names = ("model", *labels)
            return Counter(f"openmythos_{name}", what, names, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            full = f"openmythos_{name}"
            return Histogram(full, what, ("model",), buckets=buckets, registry=self.registry)

        self._finished = counter("requests", "Requests by why they ended", "finish_reason")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._new_tokens = counter("generation_tokens", "Generated tokens")
        self._loops = histogram("loops_per_token", "Loops that a generated token took", LOOPS)
        first = "From arrival to the first token"
        self._first_token = histogram("time_to_first_token_seconds", first, SECONDS)
        between = "From one token to the next"
        self._inter_token = histogram("inter_token_seconds", between, SECONDS)
        self._whole = histogram("request_seconds", "From arrival to the end", SECONDS)
        self.registry.register(_Engines(self._stats))

    def of(self, model: str, stats: Callable[[], Stats]) -> ModelMetrics:
        """The metrics of a model, whose engine's ``stats`` are read when they are asked for."""
        self._stats[model] = stats
        reasons = ("stop", "length", "abort", "deadline", "error")
        return ModelMetrics(
            prompt_tokens=self._prompt_tokens.labels(model),
            new_tokens=self._new_tokens.labels(model),
            loops=self._loops.labels(model),
            first_token=self._first_token.labels(model),
            inter_token=self._inter_token.labels(model),
            whole=self._whole.labels(model),
            finished={reason: self._finished.labels(model, reason) for reason in reasons},
        )

    def render(self) -> bytes:
        """All metrics, as text."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """The engines' own numbers, read when they are asked for."""

    def __init__(self, stats: Mapping[str, Callable[[], Stats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        now = {model: read() for model, read in self._stats.items()}
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (what, value) in table.items():
                family = kind(f"openmythos_{name}", what, labels=["model"])
                for model, stats in now.items():
                    family.add_metric([model], value(stats))
                yield family
