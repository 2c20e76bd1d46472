"""What serving a looped model costs beside plain ones: users, tokens per second, price. No torch.

Every user has a context of S tokens, and a step decodes one token for each of U users. Of weights
W, cache bytes k per token, memory M with a reserve r, bandwidth BW and ``peak`` FLOPs per second:

    users  = the most U with  W + U k_kept S <= M (1 - r)  and  t_step <= 1 / rate
    t_step = max((W_read + U k_read S) / BW,  U F / peak)
    cost   = price / (3600 U / t_step)

``W_read`` counts the core once per loop and a lookup table not at all. ``k_read`` is that of every
loop, whatever the cache layout keeps: sharing keys and values between loops saves memory, not
bandwidth. Where rows stop early, ``k_read`` and F are those of the mean depth, but the core's
weights are read as long as any row runs. Of E routed experts, U rows with K each are expected to
read E (1 - (1 - K/E)^U), per layer and loop. Exchanges between devices are not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from openmythos.config import ModelConfig, counts
from openmythos.config.matched_baseline import baseline, plain_model
from openmythos.config.schema import as_integer, as_number, require

PHI = 0.46  # a loop's worth in layers, T^phi: arXiv 2604.21106
GRID = 32  # points at which rates and batches are tried; edges between them are bisected

Measure = Literal["users", "tokens_per_second"]
MEASURES: tuple[Measure, ...] = ("users", "tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What serves: one device, or several taken as one.

    Attributes:
        memory_bytes: Of all devices.
        bytes_per_second: Memory bandwidth.
        flops_per_second: Peak of dense products.
        reserve: Share of the memory that is neither weights nor cache.
        price_per_hour: In any currency; 1 gives costs in hours of the machine.
    """

    memory_bytes: float = 80e9
    bytes_per_second: float = 3.35e12
    flops_per_second: float = 989e12
    reserve: float = 0.1
    price_per_hour: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = as_number(name, value, "a number")
            require(number > 0 or name == "reserve", name, number, "above 0")
            object.__setattr__(self, name, number)
        require(0 <= self.reserve < 1, "reserve", self.reserve, "in [0, 1)")

    @property
    def usable_bytes(self) -> float:
        """Memory for weights and cache."""
        return self.memory_bytes * (1 - self.reserve)


# Data sheets of the vendor: memory, bandwidth, dense bfloat16.
GPUS = {
    "a100": Machine(bytes_per_second=2.039e12, flops_per_second=312e12),
    "h100": Machine(),
    "h200": Machine(memory_bytes=141e9, bytes_per_second=4.8e12),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What decoding one model asks of a machine.

    Attributes:
        weight_bytes: All weights.
        read_bytes: Weights that every step reads, however many users there are.
        expert_bytes: Routed experts, as often as loops run them.
        expert_share: Share of these that one row reads.
        running: Share of the rows that run in a loop, on average.
        kept_bytes: Cache that is kept per user.
        cache_read_bytes: Cache that a step reads per user.
        flops: Of one token.
        prompt_flops: Of a whole prompt of the context's length.
    """

    weight_bytes: int
    read_bytes: int
    expert_bytes: int
    expert_share: float
    running: float
    kept_bytes: int
    cache_read_bytes: float
    flops: float
    prompt_flops: float

    def step_bytes(self, users: int) -> float:
        """Bytes that a step reads."""
        # Fewer rows run in later loops; their mean number gives no less than what is read.
        experts = self.expert_bytes * (1 - (1 - self.expert_share) ** (users * self.running))
        return self.read_bytes + experts + users * self.cache_read_bytes

    def step_seconds(self, users: int, machine: Machine) -> float:
        """Seconds in which ``users`` rows decode one token each."""
        by_bandwidth = self.step_bytes(users) / machine.bytes_per_second
        return max(by_bandwidth, users * self.flops / machine.flops_per_second)


def load_of(
    config: ModelConfig,
    *,
    context_length: int,
    kept_loops: int | None = None,
    mean_loops: float | None = None,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
) -> Load:
    """What decoding a model with its ``num_loops`` asks of a machine.

    Args:
        config: The model's.
        context_length: Tokens of every user.
        kept_loops: Loops of the core that the cache layout keeps; default: all.
        mean_loops: Mean depth of a token where an exit rule stops some; default: ``num_loops``.
        weight_bytes: Bytes per weight.
        cache_bytes: Bytes per cached number.
    """
    length = as_integer("context_length", context_length, 1, config.max_seq_len)
    depth = config.num_loops if mean_loops is None else mean_loops
    depth = as_number("mean_loops", depth, "a number")
    require(1 <= depth <= config.num_loops, "mean_loops", depth, f"in 1..{config.num_loops}")

    def at_depth(count: Callable[[int], int]) -> float:
        """A count that grows evenly with the loops, at the mean depth."""
        return float(count(0) + depth * (count(1) - count(0)))

    read = experts = 0
    share = 0.0
    for part in counts.parts(config):
        times = weight_bytes * (config.num_loops if part.looped else 1)
        if part.name.endswith(".routed_experts"):
            experts += part.weights.params * times
            share = part.weights.active / part.weights.params
        elif part.name != "embedding" or config.tie_embeddings:
            read += part.weights.active * times
    return Load(
        weight_bytes=counts.weight_bytes(config, weight_bytes),
        read_bytes=read,
        expert_bytes=experts,
        expert_share=share,
        running=depth / config.num_loops,
        kept_bytes=length
        * counts.kv_bytes_per_token(config, kept_loops=kept_loops, dtype_bytes=cache_bytes),
        cache_read_bytes=length
        * at_depth(
            lambda n: counts.kv_bytes_per_token(config, num_loops=n, dtype_bytes=cache_bytes)
        ),
        flops=at_depth(
            lambda n: counts.forward_flops(config, num_loops=n, context_length=length, cached=True)
        ),
        prompt_flops=length
        * at_depth(
            lambda n: counts.forward_flops(config, num_loops=n, context_length=(length + 1) // 2)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a machine serves of one model; ``rate`` limits how slow a user's tokens may come."""

    users: int
    seconds_per_step: float
    tokens_per_second_each: float
    tokens_per_second: float
    flops_per_byte: float
    limit: Literal["bandwidth", "compute", "no user"]
    cost_per_million_tokens: float | None


def most_users(load: Load, machine: Machine, rate: float = 0.0) -> int:
    """The most users that fit into the memory and get ``rate`` tokens per second each."""
    fitting = max(0, math.floor((machine.usable_bytes - load.weight_bytes) / load.kept_bytes))

    def quick(users: int) -> bool:
        return load.step_seconds(users, machine) * rate <= 1

    return fitting if quick(fitting) else _last(quick, 0, fitting)


def serve(load: Load, machine: Machine, *, rate: float = 0.0, most: int | None = None) -> Served:
    """What a machine serves at full use.

    Args:
        load: What the model asks.
        machine: What serves it.
        rate: Tokens per second that every user gets at least; 0: any.
        most: The most users that come at once; default: as many as can be served.
    """
    users = most_users(load, machine, rate)
    users = users if most is None else min(users, most)
    if users == 0:
        return Served(
            users=0,
            seconds_per_step=load.step_seconds(1, machine),
            tokens_per_second_each=0.0,
            tokens_per_second=0.0,
            flops_per_byte=0.0,
            limit="no user",
            cost_per_million_tokens=None,
        )
    seconds, read = load.step_seconds(users, machine), load.step_bytes(users)
    by_bandwidth = read / machine.bytes_per_second >= seconds
    return Served(
        users=users,
        seconds_per_step=seconds,
        tokens_per_second_each=1 / seconds,
        tokens_per_second=users / seconds,
        flops_per_byte=users * load.flops / read,
        limit="bandwidth" if by_bandwidth else "compute",
        cost_per_million_tokens=1e6 * machine.price_per_hour / (3600 * users / seconds),
    )


# --- the plain models -----------------------------------------------------------------------------


def plain_models(config: ModelConfig, phi: float = PHI) -> dict[str, ModelConfig]:
    """The three plain models that a looped one is compared with.

    They have as many layers as the looped one applies; as many parameters; and as many layers as
    its loops are worth, for an equal predicted loss after equally many tokens: T loops of C layers
    stand for T^phi C, to the nearest whole layer.
    """
    phi = as_number("phi", phi, "a number")
    require(0 <= phi <= 2, "phi", phi, "in 0..2")
    loops, core = config.num_loops, config.num_core_layers
    return {
        "equal depth": plain_model(config, loops * core),
        "equal parameters": baseline(config, match="parameters").config,
        "equal loss": plain_model(config, max(1, round(loops**phi * core))),
    }


# --- what would turn a verdict --------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """Where a looped model is served better than the plain one of equal predicted loss.

    Attributes:
        phi: The least phi for which it is, to three digits; None: it is not even at equal depth.
        rates: Intervals of tokens per second for each user; from 0 where any low one will do.
        batches: Intervals of users at once, at any rate; None stands for no upper end.
    """

    phi: float | None
    rates: tuple[tuple[float, float], ...]
    batches: tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class Comparison:
    """A looped model's load beside a plain one's, on one machine, in one measure."""

    looped: Load
    plain: Load
    machine: Machine
    measure: Measure

    def figures(self, rate: float = 0.0, most: int | None = None) -> tuple[float, float]:
        """What is measured of the looped model and of the plain one; 0: it does not fit."""
        figures = []
        for load in (self.looped, self.plain):
            users = most_users(load, self.machine, rate)
            users = users if most is None else min(users, most)
            quick = self.measure == "tokens_per_second" and users
            figures.append(users / load.step_seconds(users, self.machine) if quick else users)
        return float(figures[0]), float(figures[1])

    def ratio(self, rate: float = 0.0) -> float | None:
        """The looped model's figure over the plain one's; None: the plain one does not fit."""
        ours, theirs = self.figures(rate)
        return ours / theirs if theirs else None

    def wins(self, *, rate: float = 0.0, most: int | None = None) -> bool:
        """Whether the looped model is served better."""
        ours, theirs = self.figures(rate, most)
        return ours > theirs

    def winning_rates(self) -> tuple[tuple[float, float], ...]:
        """The rates, in tokens per second for each user, at which it is."""
        steps = [
            load.step_seconds(users, self.machine)
            for load in (self.looped, self.plain)
            for users in (1, max(1, most_users(load, self.machine)))
        ]
        fastest, slowest = 1 / min(steps), 1 / max(steps)  # below, memory alone is the limit
        rates = [slowest * (fastest / slowest) ** (i / GRID) for i in range(GRID + 1)]
        found = []
        for low, high in _runs([self.wins(rate=rate) for rate in rates]):
            first = 0.0 if low == 0 else self._edge(rates[low], rates[low - 1])
            last = rates[high] if high == GRID else self._edge(rates[high], rates[high + 1])
            found.append((first, last))
        return tuple(found)

    def _edge(self, inside: float, outside: float) -> float:
        """The rate nearest to ``outside`` at which the looped model is still served better."""
        for _ in range(20):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self.wins(rate=middle) else (inside, middle)
        return inside

    def winning_batches(self) -> tuple[tuple[int, int | None], ...]:
        """The numbers of users that come at once for which it is, whatever their rate."""
        most = max(most_users(load, self.machine) for load in (self.looped, self.plain))
        if most == 0:
            return ()
        sizes = sorted({round(most ** (i / GRID)) for i in range(GRID + 1)})
        found: list[tuple[int, int | None]] = []
        for low, high in _runs([self.wins(most=size) for size in sizes]):
            first, last = sizes[low], None if high == len(sizes) - 1 else sizes[high]
            if low > 0:
                first = 1 + _last(lambda n: not self.wins(most=n), sizes[low - 1], first)
            if last is not None:
                last = _last(lambda n: self.wins(most=n), last, sizes[high + 1])
            found.append((first, last))
        return tuple(found)


def turns(
    config: ModelConfig,
    comparison: Comparison,
    plain_load: Callable[[int], Load],
    rate: float,
) -> Turns:
    """What would let a looped model be served better than the plain one of equal predicted loss.

    Args:
        config: The looped model's.
        comparison: Of it and that plain model.
        plain_load: The load of the plain model with so many layers in the looped ones' place.
        rate: Tokens per second that every user gets at least, where phi is asked for.
    """
    loops, core = config.num_loops, config.num_core_layers

    def loses(layers: int) -> bool:
        other = replace(comparison, plain=plain_load(layers))
        return not other.wins(rate=rate)

    phi = None
    if loops > 1 and not loses(loops * core):
        # The plain model grows with phi: first the layers at which it falls behind.
        layers = core if not loses(core) else 1 + _last(loses, core, loops * core)
        exact = math.log(max(1.0, (layers - 0.5) / core)) / math.log(loops)
        phi = math.ceil(exact * 1000 + 1e-6) / 1000 if layers > core else 0.0
    return Turns(phi, comparison.winning_rates(), comparison.winning_batches())


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """First and last place of each run of true flags."""
    starts = [i for i, flag in enumerate(flags) if flag and (i == 0 or not flags[i - 1])]
    ends = [i for i, flag in enumerate(flags) if flag and not any(flags[i + 1 : i + 2])]
    return list(zip(starts, ends, strict=True))


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number for which ``holds``, which it does at ``low`` and does not at ``high``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
