"""What others published: figures and where they stand. Nothing here is ours."""

from typing import Any

# Parcae (arXiv 2604.12946), table 5: equal parameters and tokens, not equal FLOPs. Higher is
# better for core and core_ext, lower for the perplexities.
QUALITY: dict[str, dict[str, float]] = {
    "parcae-770m": {"core": 25.07, "core_ext": 15.19, "val_ppl": 12.49, "lambada_ppl": 19.71},
    "parcae-gpt-770m": {"core": 22.42, "core_ext": 14.20, "val_ppl": 13.08, "lambada_ppl": 22.37},
    "parcae-gpt-1.3b": {"core": 25.45, "core_ext": 15.90, "val_ppl": 11.95, "lambada_ppl": 17.26},
}
LOWER_IS_BETTER = ("val_ppl", "lambada_ppl")

# Trained looped models with published results that are larger than Huginn or near it; parameters
# as their publishers count them.
LOOPED: list[dict[str, Any]] = [
    {"model": "Huginn-0125", "billions": 3.56, "loops": 32, "source": "arXiv 2502.05171"},
    {"model": "Ouro-2.6B", "billions": 2.67, "loops": 4, "source": "arXiv 2510.25741"},
    {"model": "Nanbeige4.2-3B", "billions": 4.17, "loops": 2, "source": "arXiv 2607.22083"},
    {"model": "LoopCoder-v2", "billions": 7.0, "loops": 2, "source": "arXiv 2606.18023"},
    {
        "model": "IQuest-Coder-V1-40B-Loop",
        "billions": 40.0,
        "loops": 2,
        "source": "the model's name and its config.json (80 layers, 2 loops)",
    },
]

# Saunshi et al. (arXiv 2502.17416): its experiments on synthetic reasoning, with what was trained
# and tested; and, below, others that did train on few hops and test on more.
SAUNSHI = "Saunshi et al. 2025"
HOPS: list[dict[str, Any]] = [
    {"work": SAUNSHI, "task": "addition of 8 to 32 numbers", "trained": None, "tested": None},
    {"work": SAUNSHI, "task": "p-hop induction", "trained": [16, 32], "tested": [16, 32]},
    {"work": SAUNSHI, "task": "i-GSM, sums modulo 7", "trained": None, "tested": None},
    {"work": SAUNSHI, "task": "reasoning primitives", "trained": [0, 1], "tested": [0, 1]},
    {
        "work": "Chen 2026 (arXiv 2603.21676), a loop",
        "task": "reachability: all right to 8 hops, collapse at 10",
        "trained": [1, 2, 3, 4, 5],
        "tested": [12],
    },
    {
        "work": "Loop, Think & Generalize (arXiv 2604.07822), loops",
        "task": "walks by a curriculum: 8 loops learn 16 hops and answer 24",
        "trained": [16],
        "tested": [24],
    },
]
