"""The pool of pages against a plain model: who holds what, and what was kept when."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openmythos.engine.page_pool import SCRATCH, PagePool, Prefix

SIZE, NUM_PAGES = 2, 8
# Few different texts, so that many begin alike.
TEXTS = st.lists(st.integers(0, 1), min_size=0, max_size=9)
SETTINGS = st.sampled_from(["deep", "shallow"])


class Machine(RuleBasedStateMachine):
    """Requests read texts, share pages, end and are aborted in any order.

    The plain model: each request's list of pages, the content of every kept page as one flat tuple,
    and the order in which kept pages became idle.
    """

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, SIZE)
        self.requests: dict[int, tuple[str, list[int], list[int]]] = {}
        self.kept: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.idle: list[int] = []
        self.number = 0

    def held(self) -> list[int]:
        return [page for _, _, pages in self.requests.values() for page in pages]

    def free(self) -> int:
        return NUM_PAGES - 1 - len(set(self.held()))

    def taken(self) -> int:
        """Take a page and check that it was nobody's, and the right one to overwrite."""
        unused = set(range(1, NUM_PAGES)) - set(self.held()) - set(self.kept)
        page = self.pool.take()
        assert page not in self.held() and page != SCRATCH
        if unused:
            assert page in unused
        else:
            assert page == self.idle.pop(0)
            del self.kept[page]
        return page

    @rule(text=TEXTS, how=SETTINGS)
    def read(self, text, how):
        """A request finds what it can, takes the other pages, and reads its text."""
        wanted = []
        for end in range(SIZE, len(text) + 1, SIZE):
            same = [p for p, content in self.kept.items() if content == (how, tuple(text[:end]))]
            if not same:
                break
            wanted += same
        pages = self.pool.find(how, text)
        assert pages == wanted
        self.idle = [page for page in self.idle if page not in pages]
        self.requests[self.number] = how, text, pages
        more = -(-len(text) // SIZE) - len(pages)
        if more > self.free():
            self.end(self.number)
            return
        for _ in range(more):
            pages.append(self.taken())
        self.number += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def keep(self, data):
        how, text, pages = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        self.pool.keep(how, text, pages)
        for end, page in zip(range(SIZE, len(text) + 1, SIZE), pages, strict=False):
            content = how, tuple(text[:end])
            if content not in self.kept.values() and page not in self.kept:
                self.kept[page] = content

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fork(self, data):
        """Another request holds the same pages."""
        how, text, pages = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        self.pool.share(pages)
        assert all(map(self.pool.is_shared, pages))
        self.requests[self.number] = how, text, list(pages)
        self.number += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        self.end(data.draw(st.sampled_from(sorted(self.requests))))

    def end(self, number):
        _, _, pages = self.requests.pop(number)
        self.pool.drop(pages)
        held = self.held()
        self.idle += [page for page in pages[::-1] if page in self.kept and page not in held]

    @precondition(lambda self: self.free() < NUM_PAGES - 1)
    @rule(page=st.integers(0, NUM_PAGES - 1))
    def drop_what_nobody_holds(self, page):
        if page not in self.held():
            with pytest.raises(RuntimeError, match=f"page {page} is dropped, but nobody owns it"):
                self.pool.drop([page])
            if page not in self.kept:
                with pytest.raises(RuntimeError, match=f"page {page} is shared, but nobody"):
                    self.pool.share([page])

    @invariant()
    def counts_agree(self):
        assert self.pool.num_free == self.free()
        assert self.pool.num_kept == len(self.kept)
        for page in set(self.held()):
            several = self.held().count(page) > 1 or page in self.kept
            assert self.pool.is_shared(page) == several
        if self.free() == 0:
            with pytest.raises(RuntimeError, match="no page is free"):
                self.pool.take()

    def teardown(self):
        """After all have ended, every page can be had once more, and none twice."""
        for number in list(self.requests):
            self.end(number)
        assert sorted(self.pool.take() for _ in range(NUM_PAGES - 1)) == list(range(1, NUM_PAGES))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_all_pages_come_back_after_500_aborts():
    pool, draw, held = PagePool(65, 4), random.Random(0), []
    aborted = 0
    while aborted < 500:
        text = [draw.randrange(2) for _ in range(draw.randrange(40))]
        pages = pool.find("", text)
        while len(pages) * 4 < len(text) and pool.num_free and draw.random() < 0.95:
            pages.append(pool.take())
            if draw.random() < 0.5:
                pool.keep("", text, pages)
        held.append(pages)
        if draw.random() < 0.6 or not pool.num_free:
            pool.drop(held.pop(draw.randrange(len(held))))
            aborted += 1
    for pages in held:
        pool.drop(pages)
    assert pool.num_free == 64


def test_equal_hashes_alone_find_nothing(monkeypatch):
    """With every hash the same, content decides: tokens of this and of all earlier pages."""
    monkeypatch.setattr(Prefix, "__hash__", lambda self: 7)
    pool = PagePool(9, 2)
    pages = [pool.take(), pool.take()]
    pool.keep("deep", [1, 2, 3, 4], pages)
    assert pool.find("deep", [1, 2, 3, 4]) == pages
    assert pool.find("deep", [1, 2, 3, 5]) == pages[:1]
    assert pool.find("deep", [2, 2, 3, 4]) == []
    assert pool.find("shallow", [1, 2, 3, 4]) == []


def test_long_prefixes_are_compared_without_recursion():
    one = other = "deep"
    for token in range(20_000):
        one, other = Prefix(one, (token,)), Prefix(other, (token,))
    assert one == other
    assert one != "deep" and one.before != other and one != Prefix(one.before, (7,))


def test_the_least_recently_used_page_goes_first_and_the_end_of_a_text_before_its_beginning():
    pool = PagePool(4, 1)
    one = [pool.take(), pool.take()]
    pool.keep("", [1, 2], one)
    two = [pool.take()]
    pool.keep("", [3], two)
    pool.drop(one)
    pool.drop(two)
    pool.drop(pool.find("", [1, 2]))  # used again
    assert pool.take() == two[0]
    assert pool.take() == one[1]
    assert pool.find("", [1, 2]) == [one[0]]
