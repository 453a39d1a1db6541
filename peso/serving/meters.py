"""The Prometheus metrics of `/metrics`."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from peso.serving.remembered import How
from peso.serving.snapshot import Snapshot

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Meters:
    """The metrics of one server, in a separate registry so that a process can have several servers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "peso_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "peso_request_seconds",
            "Duration of requests in seconds.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.answers = Counter(
            "peso_answers", "Recommendations by source and reason.", ["source", "reason"], registry=registry
        )
        self.events = Counter(
            "peso_events", "Received events, new or duplicate.", ["kind"], registry=registry
        )
        self.batch = Histogram(
            "peso_batch_questions",
            "Number of questions per batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "peso_batch_seconds", "Duration of batches in seconds.", buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("peso_waiting", "Questions waiting for the model.", registry=registry)
        self.stage = Gauge("peso_stage", "The serving stage.", registry=registry)
        self.prompt_bytes = Gauge(
            "peso_prompt_memory_bytes",
            "Memory used by cached prompts of returning users, in bytes.",
            registry=registry,
        )
        self.prompt_tokens = Gauge(
            "peso_prompt_tokens",
            "Tokens of users' prompts since the stage was loaded, reused from the cache or computed.",
            ["how"],
            registry=registry,
        )
        self.remembered = Counter(
            "peso_remembered_answers",
            "Answers that were prepared, prepared ones that were used, and answers to repeated requests.",
            ["how"],
            registry=registry,
        )
        for how in get_args(How):
            self.remembered.labels(how)
        self.preparation = Histogram(
            "peso_preparation_seconds",
            "Duration of the preparation of an answer in seconds.",
            buckets=SECONDS,
            registry=registry,
        )
        self.changes = Counter("peso_stage_changes", "Changes of the serving stage.", registry=registry)
        self.problems = Counter("peso_stage_problems", "Failures to load a stage.", registry=registry)

    def describe(self, snapshot: Snapshot) -> None:
        """Set the gauges of the serving stage and of its cache of prompts."""
        self.stage.set(snapshot.stage)
        if (prompts := snapshot.prompts) is not None:
            self.prompt_bytes.set(prompts.used)
            self.prompt_tokens.labels("reused").set(prompts.reused)
            self.prompt_tokens.labels("computed").set(prompts.computed)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def on_batch(self, questions: int, seconds: float) -> None:
        """Count a batch, by its number of questions and its duration."""
        self.batch.observe(questions)
        self.batch_seconds.observe(seconds)
