"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from peso.serving.snapshot import Snapshot

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Meters:
    """A registry of its own, since several servers may live in one process, in tests for one."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "peso_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "peso_request_seconds", "Seconds of a request.", ["route"], buckets=SECONDS, registry=registry
        )
        self.answers = Counter(
            "peso_answers", "Recommendations by source and reason.", ["source", "reason"], registry=registry
        )
        self.events = Counter(
            "peso_events", "Events received, new or duplicate.", ["kind"], registry=registry
        )
        self.batch = Histogram(
            "peso_batch_questions",
            "Questions that were answered together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "peso_batch_seconds", "Seconds of a batch.", buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("peso_waiting", "Questions that wait for the model.", registry=registry)
        self.stage = Gauge("peso_stage", "The stage that answers.", registry=registry)
        self.prompt_bytes = Gauge(
            "peso_prompt_memory_bytes", "Memory that prompts of returning users take.", registry=registry
        )
        self.prompt_tokens = Gauge(
            "peso_prompt_tokens",
            "Tokens of users' prompts since the stage began to answer, by whether they were kept.",
            ["how"],
            registry=registry,
        )
        self.changes = Counter("peso_stage_changes", "Stages that began to answer.", registry=registry)
        self.problems = Counter(
            "peso_stage_problems", "Times that a stage could not be loaded.", registry=registry
        )

    def describe(self, snapshot: Snapshot) -> None:
        self.stage.set(snapshot.stage)
        if (prompts := snapshot.prompts) is not None:
            self.prompt_bytes.set(prompts.used)
            self.prompt_tokens.labels("reused").set(prompts.reused)
            self.prompt_tokens.labels("computed").set(prompts.computed)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def on_batch(self, questions: int, seconds: float) -> None:
        self.batch.observe(questions)
        self.batch_seconds.observe(seconds)
