"""The scheduler by hand: no model, no tensors."""

import subprocess
import sys
from typing import Any

import pytest

from openmythos.engine.call_cost import CallCosts, ends_after
from openmythos.engine.page_pool import PagePool
from openmythos.engine.scheduler import FORGET, Job, Scheduler


def make_scheduler(num_pages: int = 20, page_size: int = 2, **options) -> Scheduler:
    settings = {"num_seats": 4, "prefill_chunk": 4} | options
    return Scheduler(PagePool(num_pages + 1, page_size), **settings)


def make_job(number: int, length: int = 3, *, order: float | None = None, **fields) -> Job:
    prompt = fields.pop("prompt", tuple(range(10 * number, 10 * number + length)))
    first = float(number) if order is None else order
    settings = {"num_new": 8, "depth": 3} | fields
    return Job(id=number, prompt=prompt, order=(first, number), **settings)


def start(scheduler: Scheduler, *jobs: Job, now: float = 0.0) -> None:
    """Let jobs come in and read their prompts."""
    for job in jobs:
        scheduler.add(job)
    scheduler.admit(now)
    while chunks := scheduler.chunks():
        for chunk in chunks:
            scheduler.has_read(chunk, now)


def decode(scheduler: Scheduler, job: Job, token: int, loops: int = 3, now: float = 0.0) -> None:
    """A job's token goes through the core and the boundary."""
    assert job in scheduler.enter(now) or job.stage == "core"
    scheduler.has_looped([job], [job], now)
    scheduler.has_decoded(job, loops, token, now)


def test_it_needs_no_torch() -> None:
    program = "import sys, openmythos.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_first_come_first_served_and_a_priority_is_worth_some_waiting() -> None:
    scheduler = make_scheduler(num_seats=3)
    for number, order in enumerate([0.0, 1.0, 12.0, 2.0, -5.0]):
        scheduler.add(make_job(number, order=order))
    assert [job.id for job in scheduler.waiting] == [4, 0, 1, 3, 2]
    assert [job.id for job in scheduler.admit(0.0)] == [4, 0, 1]
    assert [job.id for job in scheduler.waiting] == [3, 2]


def test_a_job_that_needs_many_pages_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_pages=10)
    for number, length in enumerate([9, 13, 3]):
        scheduler.add(make_job(number, length))
    assert [job.id for job in scheduler.admit(0.0)] == [0]
    assert scheduler.admit(0.0) == []
    scheduler.remove(scheduler.running[0])
    assert [job.id for job in scheduler.admit(0.0)] == [1, 2]


def test_chunks_end_at_multiples_whatever_else_is_read() -> None:
    scheduler = make_scheduler(prefill_chunk=4)
    jobs = [make_job(0, 11), make_job(1, 2), make_job(2, 4)]
    for job in jobs:
        scheduler.add(job)
    scheduler.admit(0.0)
    seen = []
    while chunks := scheduler.chunks():
        seen.append([(chunk.job.id, chunk.start, chunk.stop) for chunk in chunks])
        for chunk in chunks:
            scheduler.has_read(chunk, 0.0)
    assert seen == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10), (1, 0, 1)], [(2, 0, 3)]]
    assert [job.stage for job in jobs] == ["ready"] * 3


def test_a_prompt_of_one_token_is_ready_at_once() -> None:
    scheduler = make_scheduler()
    job = make_job(0, 1)
    scheduler.add(job)
    scheduler.admit(0.0)
    assert job.stage == "ready" and job.token == 0 and scheduler.chunks() == []


def test_prompts_that_begin_alike_share_pages_of_equal_settings() -> None:
    scheduler = make_scheduler(num_pages=40, num_seats=9)
    text = tuple(range(9))
    first = make_job(0, prompt=text, settings="deep")
    start(scheduler, first)
    others = [
        make_job(1, prompt=(*text[:5], 77, 78), settings="deep"),
        make_job(2, prompt=text[:8], settings="shallow"),
        make_job(3, prompt=(99, *text[1:]), settings="deep"),
    ]
    start(scheduler, *others)
    assert [job.num_cached for job in others] == [4, 0, 0]
    assert others[0].pages[:2] == first.pages[:2]
    assert scheduler.chunks() == []


def test_without_reuse_nothing_is_shared() -> None:
    scheduler = make_scheduler(reuse=False)
    jobs = [make_job(number, prompt=tuple(range(9))) for number in range(2)]
    start(scheduler, *jobs)
    assert [job.num_cached for job in jobs] == [0, 0]
    assert not set(jobs[0].pages) & set(jobs[1].pages)


def test_layouts_that_lose_loops_find_whole_chunks_only() -> None:
    text = tuple(range(9))
    for exact, found in ((True, 6), (False, 4)):
        scheduler = make_scheduler(exact=exact)
        start(scheduler, make_job(0, prompt=text))
        job = make_job(1, prompt=(*text[:7], 50))
        scheduler.add(job)
        scheduler.admit(0.0)
        assert job.num_read == found
        (chunk,) = scheduler.chunks()
        assert (chunk.start, chunk.stop) == (found, 7)


def test_pages_of_a_chunk_that_is_not_whole_are_found_by_none_but_exact_layouts() -> None:
    """They would stay, and stand among the pages of a whole chunk that was read otherwise."""
    text = tuple(range(9))
    for exact, kept in ((True, 3), (False, 2)):
        scheduler = make_scheduler(exact=exact)
        start(scheduler, make_job(0, prompt=text[:8]))
        assert scheduler.pages.num_kept == kept


def test_the_same_prompt_waits_for_its_reading_and_copies_the_last_page_when_it_writes() -> None:
    scheduler = make_scheduler(prefill_chunk=2)
    jobs = [make_job(number, prompt=tuple(range(6))) for number in range(3)]
    for job in jobs:
        scheduler.add(job)
    other = make_job(3)
    scheduler.add(other)
    assert scheduler.admit(0.0) == [jobs[0], other]  # two wait, and hold nobody up
    while chunks := scheduler.chunks():
        for chunk in chunks:
            scheduler.has_read(chunk, 0.0)
    assert scheduler.admit(0.0) == jobs[1:]
    assert [job.num_cached for job in jobs] == [0, 5, 5]
    assert jobs[0].pages == jobs[1].pages == jobs[2].pages and len(jobs[0].pages) == 3
    shared, last = jobs[0].pages[:2], jobs[0].pages[2]
    assert scheduler.enter(0.0) == [jobs[0], jobs[1], jobs[2], other]
    ends = [job.pages[2] for job in jobs]
    assert len(set(ends)) == 3 and ends[2] == last  # whoever writes last needs no copy
    assert scheduler.copies == [(last, ends[0]), (last, ends[1])]
    assert all(job.pages[:2] == shared for job in jobs)


def test_the_boundary_is_held_back_for_more_rows_but_not_for_ever() -> None:
    scheduler = make_scheduler(hold=2, max_hold=5.0)
    jobs = [make_job(number) for number in range(3)]
    assert not scheduler.boundary_is_due(0.0)
    start(scheduler, *jobs)
    assert scheduler.boundary_is_due(0.0)
    assert scheduler.enter(0.0) == jobs
    scheduler.has_looped([jobs[0]], [jobs[0]], 1.0)
    assert not scheduler.boundary_is_due(5.9)
    assert scheduler.boundary_is_due(6.0)  # waited long enough
    scheduler.has_looped([jobs[1]], [jobs[1]], 2.0)
    assert scheduler.boundary_is_due(2.0)  # enough rows
    scheduler.has_decoded(jobs[0], 1, 5, 2.0)
    scheduler.has_decoded(jobs[1], 1, 5, 2.0)
    scheduler.enter(2.0)
    assert not scheduler.boundary_is_due(2.0)
    for job in jobs:
        scheduler.has_looped([job], [job], 3.0)
    scheduler.hold = 9
    assert scheduler.boundary_is_due(3.0)  # nothing else to do


def test_measured_costs_decide_if_no_number_is_given() -> None:
    scheduler = make_scheduler()
    jobs = [make_job(number, depth=2 if number < 2 else 9) for number in range(4)]
    start(scheduler, *jobs)
    scheduler.enter(0.0)
    assert [job.ends for job in jobs] == [ends_after((loops,), 0, loops) for loops in (2, 2, 9, 9)]
    scheduler.has_looped(jobs, jobs[:1], 0.0)
    assert [job.ends for job in jobs[1:]] == [ends_after((n,), 0, n) for n in (1, 8, 8)]
    assert scheduler.boundary_is_due(0.0)  # nothing was measured
    for job in jobs:
        scheduler.remove(job)
    rows = dict.fromkeys((1, 2, 4), 1.0)
    scheduler.costs = CallCosts(rows, rows)
    jobs = [make_job(number, depth=2 if number < 2 else 9) for number in range(4)]
    start(scheduler, *jobs)
    scheduler.enter(0.0)
    scheduler.has_looped(jobs, jobs[:1], 0.0)
    assert not scheduler.boundary_is_due(0.0)  # the other shallow one ends with the next loop
    scheduler.has_looped(jobs[1:], jobs[1:2], 0.0)
    assert scheduler.boundary_is_due(0.0)


def test_what_a_token_has_still_to_run_is_told_by_the_jobs_last_tokens() -> None:
    job = make_job(0, depth=8, may_stop=True)
    start(make_scheduler(), job)
    assert job.ends == ends_after((), 0, 8)  # nothing is known yet
    job.new, job.loops = [1] * FORGET, [3, 1, 5] + [4] * (FORGET - 3)
    job.num_read += FORGET
    seen = tuple(sorted(job.loops))
    assert job.ends == ends_after(seen, 0, 8)
    job.num_looped = 4
    assert job.ends == ends_after((5,), 4, 8)
    job.num_looped = 6
    assert job.ends == ends_after((1, 2), 0, 8)  # deeper than ever
    job.new, job.loops, job.num_looped = [*job.new, 1], [*job.loops, 2], 0
    job.num_read += 1
    assert job.ends == ends_after(seen, 0, 8)  # looked up anew only after more tokens
    job.num_read -= 2
    assert job.ends == ends_after((4,), 0, 4)  # recorded


def test_the_last_in_order_is_preempted_and_replays_its_loops() -> None:
    scheduler = make_scheduler(num_pages=5, num_seats=2)
    first, second = make_job(0, 3, num_new=6), make_job(1, 3, num_new=6)
    start(scheduler, first, second)
    assert first.stage == second.stage == "ready"
    decode(scheduler, second, 91, loops=2)
    assert first.stage == "core"
    scheduler.has_looped([first], [first], 0.0)
    scheduler.has_decoded(first, 3, 80, 0.0)
    assert scheduler.pages.num_free == 1
    for token in (81, 82, 83):  # the second of these needs a third page: there is one
        decode(scheduler, first, token)
    assert scheduler.num_preempted == 0 and scheduler.pages.num_free == 0
    decode(scheduler, first, 84)
    assert scheduler.num_preempted == 1 and second.stage == "waiting"
    assert second.pages == [] and second.new == [91] and second.num_read == 0
    assert scheduler.admit(0.0) == []
    scheduler.remove(first)
    assert scheduler.pages.num_free == 5
    start(scheduler)
    assert second.stage == "ready" and second.token == second.prompt[-1]
    assert second.recorded_loops == 2
    assert scheduler.enter(0.0) == [second]
    scheduler.has_looped([second], [second], 0.0)
    scheduler.has_decoded(second, 2, None, 0.0)
    assert second.token == 91 and second.recorded_loops is None and second.new == [91]


@pytest.mark.parametrize(("exact", "loops", "read"), [(True, 3, 4), (True, 2, 2), (False, 3, 2)])
def test_tokens_that_took_all_loops_are_read_again_as_a_prompt(exact, loops, read) -> None:
    scheduler = make_scheduler(exact=exact)
    job = make_job(0)
    start(scheduler, job)
    for token in (50, 51):
        decode(scheduler, job, token, loops)
    scheduler.preempt([job])
    start(scheduler)
    assert job.num_read == read and job.stage == "ready"
    assert job.recorded_loops == (None if read == 4 else loops)


def test_a_job_without_pages_preempts_itself_if_it_is_the_last() -> None:
    scheduler = make_scheduler(num_pages=4, num_seats=2)
    first, second = make_job(0, 3), make_job(1, 3)
    start(scheduler, first, second)
    scheduler.enter(0.0)
    assert scheduler.pages.num_free == 0
    for job in (first, second):
        scheduler.has_looped([job], [job], 0.0)
        scheduler.has_decoded(job, 3, 7, 0.0)
    decode(scheduler, first, 8)  # has a place left in its page
    assert scheduler.num_preempted == 0 and second.stage == "core"
    scheduler.has_looped([second], [second], 0.0)
    scheduler.has_decoded(second, 3, 7, 0.0)
    first.deadline = 1.0
    assert scheduler.enter(0.0) == [first]
    assert second.stage == "waiting" and scheduler.num_preempted == 1
    assert scheduler.expire(2.0) == [first] and scheduler.running == []


def test_removed_jobs_give_everything_back() -> None:
    scheduler = make_scheduler()
    jobs = [make_job(number, 5) for number in range(6)]
    start(scheduler, *jobs)
    scheduler.enter(0.0)
    for job in jobs:
        scheduler.remove(job)
    assert scheduler.pages.num_free == 20 and not scheduler.running and not scheduler.waiting
    assert len(scheduler.admit(0.0)) == 0
    start(scheduler, *(make_job(number) for number in range(10, 14)))
    assert sorted(job.seat for job in scheduler.running) == [0, 1, 2, 3]


def rates(**options: Any) -> tuple[float, float]:
    """Tokens per second of four jobs at 2 loops and of four beside them at 8."""
    scheduler = make_scheduler(num_pages=4000, num_seats=8, **options)
    rows, now, tokens = (1, 2, 4, 8), 0.0, {2: 0, 8: 0}
    scheduler.costs = costs = CallCosts(
        {n: 5 + 0.6 * n for n in rows}, {n: 1 + 0.2 * n for n in rows}
    )
    start(scheduler, *(make_job(n, depth=2 if n < 4 else 8, num_new=10**6) for n in range(8)))
    while now < 2000:
        if scheduler.boundary_is_due(now):
            leaving = scheduler.at("exited")
            now += costs.crossing(len(leaving) or 8)
            for job in leaving:
                scheduler.has_decoded(job, job.depth, 1, now)
                tokens[job.depth] += 1
            scheduler.enter(now)
        jobs = scheduler.at("core")
        now += costs.loop(len(jobs))
        ended = [job for job in jobs if job.num_looped + 1 == job.depth]
        scheduler.has_looped(jobs, ended, now)
    return tokens[2] / now, tokens[8] / now


def test_deep_jobs_are_held_up_as_little_as_was_asked_for() -> None:
    lockstep, total, deep = rates(hold=8), rates(), rates(fair="deep")
    assert sum(total) > sum(deep) > sum(lockstep)
    assert total[1] < 0.8 * lockstep[1] <= deep[1]
    assert deep[0] > 1.5 * lockstep[0]


def test_without_costs_fair_to_the_deep_is_lockstep() -> None:
    for fair, due in (("sum", True), ("deep", False)):
        scheduler = make_scheduler(fair=fair)
        jobs = [make_job(0, depth=1), make_job(1, depth=3)]
        start(scheduler, *jobs)
        scheduler.enter(0.0)
        scheduler.has_looped(jobs, jobs[:1], 0.0)
        assert scheduler.boundary_is_due(0.0) == due


def test_what_steps_and_crossings_take_is_a_median() -> None:
    """A few that took far too long, as on a busy machine, do not count."""
    scheduler = make_scheduler()
    scheduler.has_crossed(4, 1.0)  # nothing is known of the calls yet
    begun = scheduler.slower
    scheduler.costs = CallCosts({4: 1.0}, {1: 0.5, 4: 2.0})
    for number in range(400):
        scheduler.has_crossed(4, 60.0 if number % 10 == 0 else 6.0)
        scheduler.has_stepped(60.0 if number % 10 == 0 else 0.2)
    assert begun == 1.5 and 2.7 < scheduler.slower < 3.7
    assert 0.18 < scheduler.step_seconds < 0.25
