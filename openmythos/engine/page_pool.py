"""Which pages of a cache hold what: reference counts and reuse by content. No tensors.

A page holds the keys and values of ``page_size`` tokens in a row, for all layers and loops. It may
be referenced by several requests. A page that was filled by reading a prompt can be kept when its
last reference is dropped, for later prompts that begin alike; when no other page is unused, the
kept page that was least recently used is overwritten.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

SCRATCH = 0  # the page that nobody owns; rows that only pad a batch read and write it


class Prefix:
    """What the content of a kept page depends on: how it was read, and all tokens up to its end.

    It is hashed and compared as a whole: equal hashes alone never make two prefixes equal.

    Attributes:
        before: The prefix that ends where this page begins; for the first page, the settings.
        tokens: The page's own tokens.
    """

    __slots__ = ("_hash", "before", "tokens")

    def __init__(self, before: Hashable, tokens: tuple[int, ...]) -> None:
        self.before, self.tokens = before, tokens
        self._hash = hash((before, tokens))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine: object = self
        while mine is not other:  # a recursion could be as deep as a prompt has pages
            if not isinstance(mine, Prefix):
                return not isinstance(other, Prefix) and mine == other
            if not isinstance(other, Prefix) or mine.tokens != other.tokens:
                return False
            mine, other = mine.before, other.before
        return True


class PagePool:
    """The pages 1 .. ``num_pages - 1``; page 0 is ``SCRATCH``."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._unused = list(range(num_pages - 1, SCRATCH, -1))
        self._references = [0] * num_pages
        self._kept: dict[Prefix, int] = {}
        self._prefixes: dict[int, Prefix] = {}  # the same, by page
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept, not referenced; oldest first

    @property
    def num_free(self) -> int:
        """Number of pages that ``take`` can still give: unused ones and idle kept ones."""
        return len(self._unused) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Number of pages that ``find`` can find."""
        return len(self._kept)

    def take(self) -> int:
        """A page for new content, with one reference.

        Raises:
            RuntimeError: There is none; see ``num_free``.
        """
        if self._unused:
            page = self._unused.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._kept[self._prefixes.pop(page)]
        else:
            raise RuntimeError("no page is free")
        self._references[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page.

        Raises:
            RuntimeError: A page that nobody references and that is not kept.
        """
        for page in pages:
            if not self._references[page] and page not in self._idle:
                raise RuntimeError(f"page {page} is shared, but nobody owns it")
            self._idle.pop(page, None)
            self._references[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether its content must not change: it has several references, or is kept."""
        return self._references[page] > 1 or page in self._prefixes

    def drop(self, pages: Sequence[int]) -> None:
        """Remove a reference to each page of a text, given in the text's order.

        Raises:
            RuntimeError: A page without references.
        """
        # The last first: a kept page is of no use once an earlier one of its text is overwritten.
        for page in reversed(pages):
            if self._references[page] < 1:
                raise RuntimeError(f"page {page} is dropped, but nobody owns it")
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._prefixes:
                self._idle[page] = None
            else:
                self._unused.append(page)

    def find(self, settings: Hashable, tokens: Sequence[int]) -> list[int]:
        """The kept pages of the longest beginning of ``tokens``, each with a new reference.

        ``settings`` is everything else that the content depends on.
        """
        before, pages = settings, []
        for part in self._full(tokens):
            page = self._kept.get(Prefix(before, part))
            if page is None:
                break
            before = self._prefixes[page]  # the same object as in later pages: compared at once
            pages.append(page)
        self.share(pages)
        return pages

    def keep(self, settings: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Let ``find`` find the full ones of the pages that hold ``tokens``.

        Where another page with the same content is kept, that one stays.
        """
        before = settings
        for part, page in zip(self._full(tokens), pages, strict=False):
            prefix = Prefix(before, part)
            if prefix not in self._kept and page not in self._prefixes:
                self._kept[prefix], self._prefixes[page] = page, prefix
            before = self._prefixes[self._kept[prefix]] if prefix in self._kept else prefix

    def _full(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of each full page."""
        size = self.page_size
        return [tuple(tokens[end - size : end]) for end in range(size, len(tokens) + 1, size)]
