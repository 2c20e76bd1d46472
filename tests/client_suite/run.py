"""Clients and suites that people already have, against ``openmythos serve``.

    make test-clients            or   make test-clients ARGS="--only schemathesis zoo:text"

``make test-clients`` installs them into an environment of its own, ``.clients``; ``checks.py`` runs
there and has what each does. The server is a process of its own, of a small random model of bytes
unless a checkpoint of text is named. What it gave is written to ``results.md``. Exits with 0 if all
passed. Not part of the test suite: it takes minutes and a gigabyte of packages.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import httpx

from openmythos.checkpoint.save import save_pretrained
from openmythos.interop.hub import local_folder
from openmythos.tokenizer import byte_tokenizer
from tests.command.test_serve import free_port
from tests.serve.running import small_model

HERE = Path(__file__).parent
CHECKS = {
    "openai_sync": "openai",
    "openai_async": "openai",
    "openai_errors": "openai",
    "litellm": "litellm",
    "langchain": "langchain-openai",
    "llm": "llm",
    "open_responses": "openresponses-types",
    "schemathesis": "schemathesis",
    "lm_eval": "lm_eval",
    "guidellm": "guidellm",
}
KEY = "the right key"
TEXTS = (
    ("Return the length of", " the object."),
    ("If the file does not", " exist, an error is raised."),
    ("This function returns a", " list of strings."),
    ("The default value is", " None."),
)
TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


@contextlib.contextmanager
def server(folder: Path, **environment: str) -> Iterator[str]:
    """The address of a server of a checkpoint."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "openmythos", "serve", str(folder), "--port", str(port)]
    # Answers without a limit of their own end after five seconds.
    process = subprocess.Popen(
        [*command, "--timeout", "5"], env=os.environ | environment, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        if process.wait() != 0:
            print("the server did not end well", file=sys.stderr)


def write_task(folder: Path) -> Path:
    """A task of lm-evaluation-harness that needs no network."""
    rows, task = folder / "rows.jsonl", folder / "words.yaml"
    lines = [json.dumps({"context": text, "target": target}) for text, target in TEXTS]
    rows.write_text("\n".join(lines), encoding="utf-8")
    task.write_text(TASK.format(rows=rows), encoding="utf-8")
    return task


def own_score(checkpoint: Path, task: Path) -> float:
    """The perplexity of the task as ``openmythos eval`` finds it, at the model's own depth."""
    loops = json.loads((local_folder(checkpoint) / "config.json").read_text())["num_loops"]
    command = [sys.executable, "-m", "openmythos", "eval", str(checkpoint), "--tasks", str(task)]
    made = subprocess.run(
        [*command, "--num-loops", str(loops), "--json"], stdout=subprocess.PIPE, check=True
    )
    score: float = json.loads(made.stdout)["curves"][0]["scores"][0]["value"]
    return score


def version(python: Path, package: str) -> str:
    """The version of a package in the clients' environment."""
    said = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.check_output([python, "-c", said], text=True).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: a small random model")
    parser.add_argument("--python", type=Path, default=Path(".clients/bin/python"))
    parser.add_argument("--only", choices=CHECKS, help="one of the checks")
    parser.add_argument("--out", type=Path, default=HERE / "results.md")
    options = parser.parse_args()
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = save_pretrained(
                small_model(max_seq_len=1024), Path(made, "small"), byte_tokenizer()
            )
        task = write_task(Path(made))
        url = stack.enter_context(server(checkpoint))
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        guarded = stack.enter_context(server(checkpoint, OPENMYTHOS_API_KEY=KEY))
        environment = os.environ | {
            "GUARDED_URL": guarded,
            "GUARDED_KEY": KEY,
            "TASK": str(task),
            "TOKENIZER": str(local_folder(checkpoint)),
            "OWN_SCORE": str(own_score(checkpoint, task)),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        for check in [options.only] if options.only else CHECKS:
            command = [options.python, HERE / "checks.py", check, url, model]
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            failed = ended.returncode != 0
            wrong += failed
            lines = (ended.stderr if failed else ended.stdout).strip().splitlines() or [""]
            package = CHECKS[check]
            row = (check, f"{package} {version(options.python, package)}")
            rows.append((*row, "**failed**" if failed else "passed", lines[-1]))
            print(*rows[-1], sep="  ", flush=True)
            if failed:
                print(ended.stderr, file=sys.stderr)
    if not options.only:
        head = f"# Results of `make test-clients`, {date.today()}\n\nThe model: {model}.\n\n"
        table = ["| check | with | result | |", "|---|---|---|---|"]
        table += ["| " + " | ".join(row) + " |" for row in rows]
        options.out.write_text(head + "\n".join(table) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
