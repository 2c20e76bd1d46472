"""Metrics by model, and the engine's own numbers when they are read."""

from dataclasses import replace

from openmythos.engine.engine import Stats
from openmythos.serve.metrics import Metrics

STATS = Stats(
    num_running=2,
    num_waiting=1,
    num_free_pages=30,
    num_pages=40,
    num_steps=7,
    num_preempted=3,
    num_new_tokens=11,
    num_prompt_tokens_read=20,
    num_prompt_tokens_found=5,
    core_applications=90,
    rows_per_step=1.5,
    finished={},
)


def test_two_models_are_told_apart() -> None:
    metrics, stats = Metrics(), STATS
    one, two = metrics.of("one", lambda: stats), metrics.of("two", lambda: STATS)
    one.finished["stop"].inc()
    one.loops.observe(3)
    two.new_tokens.inc(5)
    stats = replace(STATS, num_running=9)
    lines = metrics.render().decode().splitlines()
    for line in (
        'openmythos_requests_total{finish_reason="stop",model="one"} 1.0',
        'openmythos_requests_total{finish_reason="length",model="two"} 0.0',
        'openmythos_loops_per_token_bucket{le="2.0",model="one"} 0.0',
        'openmythos_loops_per_token_bucket{le="3.0",model="one"} 1.0',
        'openmythos_generation_tokens_total{model="two"} 5.0',
        'openmythos_requests_running{model="one"} 9.0',
        'openmythos_requests_running{model="two"} 2.0',
        'openmythos_preemptions_total{model="two"} 3.0',
        'openmythos_rows_per_step{model="one"} 1.5',
    ):
        assert line in lines
