"""A looped transformer, its training, and the map of what each loop reads. Needs only torch.

A walk over a small graph is written ``start, relation, relation ...``; the answer is the entity
that it reaches. Every relation is a permutation of the entities, so nothing but following the walk
gives the answer. A core of two layers, applied four times, learns walks of growing length. Then it
is asked longer walks than any that it was trained on, with more loops, and the reading map shows
what each loop does.

    python experiments/00_minimal_loop/minimal_loop.py          # minutes, on one thread
    python experiments/00_minimal_loop/minimal_loop.py --smoke  # seconds: that it runs, no result
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENTITIES, RELATIONS = 16, 4
WIDTH, HEADS = 64, 4
TRAINED_LOOPS, TRAINED_HOPS = 4, 8
LOOPS = (4, 5, 6, 8)  # that are tried afterwards


# --- the task ------------------------------------------------------------------------------------


class Walks:
    """Tokens 0 to 15 are entities, 16 to 19 relations."""

    def __init__(self, seed: int) -> None:
        self.draws = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(ENTITIES, generator=self.draws) for _ in range(RELATIONS)]
        self.relations = torch.stack(orders)  # [relation, entity] -> entity

    def draw(self, number: int, hops: int) -> Tensor:
        """Walks, one per row."""
        start = torch.randint(ENTITIES, (number, 1), generator=self.draws)
        relations = torch.randint(RELATIONS, (number, hops), generator=self.draws)
        return torch.cat([start, ENTITIES + relations], dim=1)

    def answers(self, walks: Tensor) -> Tensor:
        """The entities that the walks reach."""
        entity = walks[:, 0]
        for relation in walks[:, 1:].T:
            entity = self.relations[relation - ENTITIES, entity]
        return entity

    def corrupted(self, walks: Tensor, place: int) -> Tensor:
        """The walks with another token of the same kind at this place."""
        first, kinds = (0, ENTITIES) if place == 0 else (ENTITIES, RELATIONS)
        shift = torch.randint(1, kinds, (len(walks),), generator=self.draws)
        changed = walks.clone()
        changed[:, place] = first + (walks[:, place] - first + shift) % kinds
        return changed


# --- the model -----------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Attention and feed-forward; both outputs begin at zero, so the block begins as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [walk, head, token, channel]
        mixed = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class LoopedModel(nn.Module):
    """h_0 = 0,  h_{t+1} = core(A h_t + B e):  the same weights at every loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ENTITIES + RELATIONS, WIDTH)
        self.a = nn.Parameter(torch.zeros(WIDTH))  # A = sigmoid(a), between 0 and 1
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.core = nn.Sequential(Block(), Block())
        nn.init.normal_(self.embed.weight, std=0.08)
        nn.init.eye_(self.b.weight)

    def encode(self, walks: Tensor) -> Tensor:
        """B e: what every loop is given anew."""
        return self.b(norm(self.embed(walks)))

    def loop(self, h: Tensor, e: Tensor) -> Tensor:
        return self.core(self.a.sigmoid() * h + e)

    def decode(self, h: Tensor) -> Tensor:
        """A score for each entity, read at the last token."""
        return norm(h[:, -1]) @ self.embed.weight[:ENTITIES].T

    def states(self, e: Tensor, loops: int) -> list[Tensor]:
        """h_0 to h_loops."""
        found = [torch.zeros_like(e)]
        for _ in range(loops):
            found.append(self.loop(found[-1], e))
        return found

    def forward(self, walks: Tensor, loops: int) -> Tensor:
        return self.decode(self.states(self.encode(walks), loops)[-1])


# --- training ------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: LoopedModel, walks: Walks, hops: int, loops: int) -> float:
    asked = walks.draw(512, hops)
    return float((model(asked, loops).argmax(-1) == walks.answers(asked)).float().mean())


def train(model: LoopedModel, walks: Walks, steps: int) -> None:
    """Walks of one hop first; one hop more as soon as 95 % of the present length are right."""
    matrices = list(model.core.parameters())
    rest = [param for name, param in model.named_parameters() if not name.startswith("core.")]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.003, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=0.002, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    hops, started = 1, time.perf_counter()
    for step in range(steps):
        asked = walks.draw(128, hops)
        loss = F.cross_entropy(model(asked, TRAINED_LOOPS), walks.answers(asked))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / (0.03 * steps), (1 - step / steps) / 0.6)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            right, seconds = accuracy(model, walks, hops, TRAINED_LOOPS), time.perf_counter()
            print(
                f"step {step + 1:4}: {right:4.0%} of {hops} hops right, {seconds - started:.0f} s"
            )
            hops = min(TRAINED_HOPS, hops + (right >= 0.95))


# --- the reading map -----------------------------------------------------------------------------


@torch.no_grad()
def reading_map(model: LoopedModel, walks: Walks, hops: int, loops: int, number: int) -> Tensor:
    """[loop, token]: the share of a token's effect on the answer that one loop's reading has.

    The tokens are the start and all relations but the last, where the answer is read. During one
    loop all others see the state that another token would have had; the token's own state and all
    other loops stay clean. How far does the answer move, compared with another token throughout?
    """
    shares = torch.zeros(loops, hops)
    for place in range(hops):
        clean = walks.draw(number, hops)
        changed = walks.corrupted(clean, place)
        differs = walks.answers(clean) != walks.answers(changed)
        clean, changed = clean[differs], changed[differs]
        answers = torch.stack([walks.answers(clean), walks.answers(changed)], dim=1)
        e, other_e = model.encode(clean), model.encode(changed)
        h, other_h = model.states(e, loops), model.states(other_e, loops)
        for misread in range(loops):
            state = h[misread]
            for t in range(misread, loops):
                seen, given = state.clone(), e.clone()
                if t == misread:
                    seen[:, place], given[:, place] = other_h[t][:, place], other_e[:, place]
                state = model.loop(seen, given)
                state[:, place] = h[t + 1][:, place]
            # How much the right answer's score is above that of the changed walk's answer.
            above = [model.decode(s).gather(1, answers) for s in (h[-1], state, other_h[-1])]
            right, once, always = (float((s[:, 0] - s[:, 1]).mean()) for s in above)
            shares[misread, place] = (right - once) / (right - always)
    return shares


def bits_between_loops(shares: Tensor) -> Tensor:
    """Jensen-Shannon divergence of neighbouring rows: 0 if equal, 1 if they share no token."""
    rows = shares.clamp(min=1e-9)
    rows = rows / rows.sum(dim=1, keepdim=True)
    one, two, mean = rows[:-1], rows[1:], (rows[:-1] + rows[1:]) / 2
    return (one * (one / mean).log2() + two * (two / mean).log2()).sum(dim=1) / 2


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps: that it runs")
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    walks, model = Walks(given.seed), LoopedModel()
    train(model, walks, 25 if given.smoke else given.steps)
    print("\nright answers" + "".join(f"{loops:4} loops" for loops in LOOPS))
    for hops in (TRAINED_HOPS, TRAINED_HOPS + 2):
        right = [accuracy(model, walks, hops, loops) for loops in LOOPS]
        print(f"{hops:8} hops " + "".join(f"{share:10.0%}" for share in right))
    loops = LOOPS[right.index(max(right))]  # the fewest that suffice; more would hide what one does
    print(f"\nwhat each loop reads, at {hops} hops, never trained, and {loops} loops\n")
    shares = reading_map(model, walks, hops, loops, 8 if given.smoke else 512)
    print("        start" + "".join(f"   r{k}" for k in range(1, hops)))
    for t, row in enumerate(shares.tolist(), start=1):
        print(f"loop {t}  " + "".join(f"{x:5.2f}" if abs(x) >= 0.05 else "    ." for x in row))
    bits = ", ".join(f"{x:.2f}" for x in bits_between_loops(shares).tolist())
    print(f"\nbits between neighbouring loops: {bits}")
    return shares


if __name__ == "__main__":
    main()
