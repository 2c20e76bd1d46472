"""Greedy tokens of exports in vLLM's Transformers backend against ours, token for token.

    make test-vllm                       or   make test-vllm ARGS="--only dense"

Needs an environment of its own (3.4 GB), which ``make test-vllm`` installs into ``.vllm``. Not part
of the test suite: an engine takes a minute and more to start.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from openmythos import generate
from openmythos.config import (
    GQAConfig,
    LinearInjectionConfig,
    LTIInjectionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    SwiGLUConfig,
)
from openmythos.interop.export import export_hf
from tests.strategies import random_model, random_tokens

ENGINE = Path(__file__).parent / "engine.py"
NUM_LOOPS, SHALLOW, NEW_TOKENS = 4, 2, 16
# Widths that vLLM's CPU kernels have.
GQA = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm="weighted", qk_bias=True)
MLA = MLAConfig(
    num_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
)
MOE = MoEConfig(
    num_experts=8,
    num_experts_per_token=2,
    d_expert=64,
    routed_scale=1.5,
    bias_loops=NUM_LOOPS,
)


def config(**changes: object) -> ModelConfig:
    fields = {
        "vocab_size": 256,
        "d_model": 64,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_coda_layers": 1,
        "num_loops": NUM_LOOPS,
        "attention": GQA,
        "feed_forward": SwiGLUConfig(d_ff=128),
        "max_seq_len": 64,
        "injection": LTIInjectionConfig(),
    }
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


MODELS = {
    "dense": config(),
    "moe": config(core_feed_forward=MOE, injection=LinearInjectionConfig()),
    "mla": config(attention=MLA),
}
RUNS = ((None, 1), (SHALLOW, 1), (None, 2))  # (num_loops, ranks)


def run_engine(python: str, asked: dict) -> dict:
    command = [python, str(ENGINE), json.dumps(asked)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        log = Path(asked["folder"]).parent / "engine.log"
        log.write_text(ran.stdout + ran.stderr, encoding="utf-8")
        causes = [line for line in log.read_text(encoding="utf-8").splitlines() if "Error" in line]
        raise SystemExit("\n".join(["error: vLLM gave no result", *causes[-20:]]))
    return json.loads(found[-1].removeprefix("RESULT "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=".vllm/bin/python", help="of vLLM's environment")
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--ranks", type=int, help="only the runs on so many ranks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("model  loops  ranks  tokens          start     16 tokens", flush=True)
    wrong = 0
    for name in [arguments.only] if arguments.only else MODELS:
        model = random_model(MODELS[name])
        prompts = [random_tokens(model.config, n, seed=n).tolist() for n in (3, 11, 7)]
        with tempfile.TemporaryDirectory() as parent:
            folder = export_hf(model, Path(parent) / name)
            for num_loops, ranks in RUNS:
                if arguments.ranks not in (None, ranks):
                    continue
                expected = generate(
                    model, prompts, max_new_tokens=NEW_TOKENS, num_loops=num_loops
                ).tokens
                asked = {
                    "folder": str(folder),
                    "prompts": prompts,
                    "max_new_tokens": NEW_TOKENS,
                    "num_loops": num_loops,
                    "ranks": ranks,
                }
                found = run_engine(arguments.python, asked)
                equal = found["tokens"] == expected
                wrong += not equal
                start, rest = found["start_seconds"], found["generate_seconds"]
                print(
                    f"{name:5}  {num_loops or NUM_LOOPS:5}  {ranks:5}  "
                    f"{'all equal' if equal else 'DIFFERENT':14}  {start:5.1f} s  {rest:7.1f} s",
                    flush=True,
                )
                if not equal:
                    print(f"  ours {expected}\n  vLLM {found['tokens']}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
