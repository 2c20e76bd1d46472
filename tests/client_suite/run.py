"""Clients and suites that people already have, against ``openmythos serve``.

    make test-clients            or   make test-clients ARGS="runs/demo/text --only llm litellm"

``make test-clients`` installs them into an environment of its own, ``.clients``; ``checks.py`` runs
there and has what each does. The server is a process of its own, of ``zoo:text`` unless another
checkpoint of text is named. It ends with a table of every check, those that were left out too, and
``results.md`` gets the same unless ``--only`` was given. Exits with 0 if all that ran passed. Not
part of the test suite: it takes minutes and a gigabyte of packages.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from openmythos.eval.exit_choice import processor_name
from openmythos.interop.hub import local_folder
from tests.command.test_serve import free_port

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


class Row(NamedTuple):
    """What a check gave."""

    check: str
    result: str
    seconds: str
    said: str


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


def run_check(python: Path, check: str, url: str, model: str, environment: dict[str, str]) -> Row:
    """Run a check in the clients' environment: what it gave, as a row of the table."""
    begun = time.monotonic()
    command = [python, HERE / "checks.py", check, url, model]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    failed = ended.returncode != 0
    if failed:
        print(ended.stderr, file=sys.stderr)
    lines = (ended.stderr if failed else ended.stdout).strip().splitlines() or [""]
    seconds = f"{time.monotonic() - begun:.0f}"
    return Row(check, "**failed**" if failed else "passed", seconds, lines[-1])


def table(rows: Sequence[Row], python: Path) -> str:
    """The rows in Markdown, those of checks that did not run too."""
    done = {row.check: row for row in rows}
    lines = ["| check | with | result | s | remark |", "|---|---|---|---|---|"]
    for check, package in CHECKS.items():
        row = done.get(check, Row(check, "not run", "", ""))
        cells = (check, f"{package} {version(python, package)}", row.result, row.seconds, row.said)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path("zoo:text"))
    parser.add_argument("--python", type=Path, default=Path(".clients/bin/python"))
    parser.add_argument("--only", choices=CHECKS, nargs="+", help="some of the checks")
    parser.add_argument("--out", type=Path, default=HERE / "results.md")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        checkpoint, task = options.checkpoint, write_task(Path(made))
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
        for check in options.only or CHECKS:
            print(f"{check} ...", file=sys.stderr, flush=True)
            rows.append(run_check(options.python, check, url, model, environment))
    processor = processor_name(torch.device("cpu"))
    head = f"The model: {checkpoint}. {date.today()}, {processor}."
    print(f"{head}\n\n{table(rows, options.python)}", end="")
    if not options.only:
        text = f"# Results of `make test-clients`\n\n{head}\n\n{table(rows, options.python)}"
        options.out.write_text(text, encoding="utf-8")
    return 1 if any(row.result != "passed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
