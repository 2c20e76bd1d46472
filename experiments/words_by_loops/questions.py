"""Walk questions in words: who stands where in a ring of friends, and what guessers answer."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NAMES = (
    *("Anna", "Ben", "Carl", "David", "Emma", "Frank", "Grace", "Henry", "Jack", "Kate", "Laura"),
    *("Mary", "Nick", "Oscar", "Paul", "Rose", "Sam", "Tom", "Victor", "Will", "Alice", "Bob"),
    *("John", "James", "Peter", "Simon", "Sarah", "Lucy", "Mark", "Luke", "Jane", "Adam", "Eric"),
)  # each is one token after a space
FRIENDS = 6
STEPS = {1: "One place", 2: "Two places", 3: "Three places", 4: "Four places"}


@dataclass(frozen=True)
class Question:
    """A ring's facts and a walk on it, in words.

    Attributes:
        text: The facts in any order, and the beginning of the answer's sentence.
        answer: The name that ends it.
        named: The friends in the order in which the facts name them, each fact's two.
        start: Where the walk begins.
    """

    text: str
    answer: str
    named: tuple[str, ...]
    start: str

    @property
    def friends(self) -> list[str]:
        """Every friend once."""
        return sorted(set(self.named))


def ask(hops: int, count: int, seed: int) -> list[Question]:
    """Questions of so many hops; equal arguments give the same ones."""
    drawn = random.Random(f"{hops} {seed}")
    return [_question(drawn, hops) for _ in range(count)]


def _question(drawn: random.Random, hops: int) -> Question:
    ring = drawn.sample(NAMES, FRIENDS)
    facts = [(ring[(place + 1) % FRIENDS], ring[place]) for place in range(FRIENDS)]
    drawn.shuffle(facts)
    told = " ".join(f"{one} stands behind {other}." for one, other in facts)
    start = ring[0]
    text = f"Friends: {told} {STEPS[hops]} behind {start} stands"
    return Question(text, ring[hops], tuple(name for fact in facts for name in fact), start)


def leaks(asked: Sequence[Question]) -> dict[str, float]:
    """Share of right answers of guessers that take no walk."""

    def before_or_after(question: Question, place: int) -> str:
        pairs = list(zip(question.named[::2], question.named[1::2], strict=True))
        fact = next(pair for pair in pairs if pair[1 - place] == question.start)
        return fact[place]

    guessers: dict[str, Callable[[Question], str]] = {
        "first named": lambda q: q.named[0],
        "last named": lambda q: next(n for n in reversed(q.named) if n != q.start),
        "one step behind": lambda q: before_or_after(q, 0),
        "one step before": lambda q: before_or_after(q, 1),
        "most frequent": lambda q: Counter(a.answer for a in asked).most_common(1)[0][0],
    }
    found = {"chance, not the start": 1 / (FRIENDS - 1)}
    for name, guess in guessers.items():
        found[name] = sum(guess(q) == q.answer for q in asked) / len(asked)
    return found
