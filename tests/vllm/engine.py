"""One start of vLLM on an export: greedy tokens as JSON. Runs in vLLM's own environment.

The argument is a JSON object: ``folder``, ``prompts``, ``max_new_tokens``, ``num_loops`` (or null),
``ranks``.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(asked: dict) -> dict:
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    num_loops = asked["num_loops"]
    llm = LLM(
        model=asked["folder"],
        model_impl="transformers",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        tensor_parallel_size=asked["ranks"],
        hf_overrides={} if num_loops is None else {"num_loops": num_loops},
    )
    ready = time.perf_counter()
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "start_seconds": ready - started,
        "generate_seconds": time.perf_counter() - ready,
    }


if __name__ == "__main__":  # vLLM starts processes that import this file
    result = main(json.loads(sys.argv[1]))
    print("RESULT " + json.dumps(result), flush=True)
