"""What clients that people already have do with the server. Runs in the clients' environment.

PYTHON tests/client_suite/checks.py CHECK URL MODEL
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MESSAGES: list[Any] = [{"role": "user", "content": "What does len return?"}]
OURS = {"include_loops": True}
OPEN_RESPONSES = {"store", "presence_penalty", "frequency_penalty"}  # it asks for these


# --- openai ---------------------------------------------------------------------------------------


def foreign(made: Any) -> set[str]:
    """The names of all fields that the client's types do not know, at any depth.

    Not those of a response that the Open Responses specification wants.
    """
    from pydantic import BaseModel

    found: set[str] = set()
    if isinstance(made, BaseModel):
        found |= set(made.model_extra or {})
        for name in type(made).model_fields:
            found |= foreign(getattr(made, name))
    elif isinstance(made, list):
        found = found.union(*map(foreign, made))
    return found - OPEN_RESPONSES


def valid(made: Any, *extra: str) -> Any:
    """The object, after a strict check of its types, with no other foreign field than these."""
    type(made).model_validate(made.to_dict(), strict=True)
    assert foreign(made) == set(extra), f"{type(made).__name__} has {foreign(made)}"
    return made


def openai_sync(url: str, model: str) -> None:
    """Models, completions, chat, responses, streams, logprobs, n, stop, seed, abort."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve(model).id == model
    assert model in [one.id for one in client.models.list()]
    settings: Any = {"model": model, "max_tokens": 12, "seed": 3, "temperature": 0.8}
    for fields, extra in (({}, ()), (OURS, ("loops",))):
        given = {**settings, "extra_body": fields}
        made = valid(client.completions.create(prompt="The loop", n=2, logprobs=3, **given), *extra)
        again = client.completions.create(prompt="The loop", n=2, logprobs=3, **given)
        assert [c.text for c in made.choices] == [c.text for c in again.choices]
        talk = {**given, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
        chat = valid(client.chat.completions.create(n=2, **talk), *extra)
        assert all(len(entry.top_logprobs) == 2 for entry in chat.choices[0].logprobs.content)
        pieces = list(
            client.chat.completions.create(
                **talk, stream=True, stream_options={"include_usage": True}
            )
        )
        assert set().union(*map(foreign, pieces)) == set(extra)
        for piece in pieces:
            type(piece).model_validate(piece.to_dict(), strict=True)
        text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert text == chat.choices[0].message.content and pieces[-1].usage
        words: Any = {"model": model, "input": MESSAGES, "max_output_tokens": 12}
        reply = valid(client.responses.create(**words, temperature=0, extra_body=fields), *extra)
        events = list(
            client.responses.create(**words, temperature=0, extra_body=fields, stream=True)
        )
        for event in events:
            type(event).model_validate(event.to_dict(), strict=True)
        assert events[-1].response.output_text == reply.output_text
    plain = client.completions.create(prompt="The", model=model, max_tokens=30, temperature=0)
    stop = plain.choices[0].text[5:8]
    cut = client.completions.create(
        prompt="The", model=model, max_tokens=30, temperature=0, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop" and stop not in cut.choices[0].text
    stream = client.completions.create(
        prompt="a", model=model, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    idle(url)


def openai_async(url: str, model: str) -> None:
    """The same calls at once, in one event loop, and a task that is cancelled."""
    import openai

    async def ask() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            settings: Any = {"model": model, "max_tokens": 12, "temperature": 0}
            many = [client.chat.completions.create(messages=MESSAGES, **settings)]
            many += [client.completions.create(prompt="The loop", **settings) for _ in range(4)]
            chat, *texts = await asyncio.gather(*many)
            valid(chat)
            assert len({made.choices[0].text for made in map(valid, texts)}) == 1
            stream = await client.chat.completions.create(
                messages=MESSAGES, stream=True, **settings
            )
            parts = [piece.choices[0].delta.content or "" async for piece in stream]
            assert "".join(parts) == chat.choices[0].message.content
            reply = await client.responses.create(
                model=model, input="Hello", max_output_tokens=12, temperature=0
            )
            assert valid(reply).output_text
            assert model in [one.id async for one in client.models.list()]
            long = client.completions.create(
                prompt="a", model=model, max_tokens=800, extra_body={"ignore_eos": True}
            )
            task = asyncio.ensure_future(long)
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(ask())
    idle(url)


def openai_errors(url: str, model: str) -> None:
    """Every class of error that the server can answer with, as the client's exception."""
    import openai

    def client(key: str = "none", base: str = url) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=30)

    def ask(made: openai.OpenAI | None = None, **fields: Any) -> None:
        (made or client()).chat.completions.create(
            **{"model": model, "messages": MESSAGES, **fields}
        )

    for wanted, act in (
        (openai.BadRequestError, lambda: ask(temperature=-1)),
        (openai.BadRequestError, lambda: ask(max_tokens=10**6)),
        (openai.NotFoundError, lambda: ask(model="absent")),
        (openai.NotFoundError, lambda: client().embeddings.create(model=model, input="a")),
        (openai.APIStatusError, lambda: ask(user="x" * (5 << 20))),  # 413
        (openai.APIConnectionError, lambda: ask(client(base="http://127.0.0.1:9"))),
        (openai.APITimeoutError, lambda: ask(client().with_options(timeout=0.001))),
    ):
        error = raised(act)
        assert isinstance(error, wanted), f"{error!r} is no {wanted.__name__}"
        assert not isinstance(error, openai.APIStatusError) or error.body["message"]  # type: ignore[index]
    if guarded := os.environ.get("GUARDED_URL"):
        assert client(os.environ["GUARDED_KEY"], guarded).models.list()
        error = raised(client("wrong", guarded).models.list)
        assert isinstance(error, openai.AuthenticationError), error


def raised(act: Callable[[], Any]) -> Exception | None:
    """The error that a call ends with; None: it does not."""
    try:
        act()
    except Exception as error:
        return error
    return None


def idle(url: str) -> None:
    """Wait until the server computes nothing, for a second at most."""
    import time

    end = time.monotonic() + 1
    while True:
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        running = [line for line in lines if line.startswith("openmythos_requests_running{")]
        if all(line.endswith(" 0.0") for line in running):
            return
        assert time.monotonic() < end, running
        time.sleep(0.05)


# --- other clients --------------------------------------------------------------------------------


def litellm(url: str, model: str) -> None:
    """One chat and one stream."""
    import litellm as client

    settings: Any = {
        "model": f"openai/{model}",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.completion(**settings).choices[0].message.content
    pieces = client.completion(**settings, stream=True)
    assert whole and whole == "".join(p.choices[0].delta.content or "" for p in pieces)


def langchain(url: str, model: str) -> None:
    """One chat and one stream."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model=model, base_url=f"{url}/v1", api_key="none", max_tokens=12, temperature=0
    )
    whole = chat.invoke("What does len return?")
    assert whole.content and whole.usage_metadata["input_tokens"] > 0  # type: ignore[index]
    assert whole.content == "".join(str(p.content) for p in chat.stream("What does len return?"))


def llm(url: str, model: str) -> None:
    """Simon Willison's ``llm``: one chat and one stream, by its command line."""
    with tempfile.TemporaryDirectory() as home:
        entry = {"model_id": "ours", "model_name": model, "api_base": f"{url}/v1"}
        Path(home, "extra-openai-models.yaml").write_text(json.dumps([entry]))
        program = Path(sys.executable).with_name("llm")
        command = [str(program), "-m", "ours", "-o", "max_tokens", "12", "-o", "temperature", "0"]
        environment = {**os.environ, "LLM_USER_PATH": home}
        said = [
            subprocess.run(
                [*command, *more, "What does len return?"],
                env=environment,
                capture_output=True,
                check=True,
                text=True,
            ).stdout.strip()
            for more in (["--no-stream"], [])
        ]
        assert said[0] and said[0] == said[1]


def open_responses(url: str, model: str) -> None:
    """Basic, streaming, system prompt, several turns; by the types of the Open Responses spec."""
    from openresponses_types import ResponseResource
    from openresponses_types import types as spec
    from pydantic import TypeAdapter

    def message(role: str, content: str) -> dict[str, str]:
        return {"type": "message", "role": role, "content": content}

    def post(items: list[Any], stream: bool) -> Iterator[Any]:
        body = {"model": model, "input": items, "stream": stream, "max_output_tokens": 200}
        head = {"content-type": "application/json"}
        asked = urllib.request.Request(f"{url}/v1/responses", json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked, timeout=120) as answer:
            if not stream:
                yield json.load(answer)
                return
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    question = message("user", "Say hello.")
    system = message("system", "You are a pirate.")
    turns = [message("user", "My name is Alice."), message("assistant", "Hello Alice!"), question]
    for items in ([question], [system, question], turns):
        (made,) = post(items, False)
        ResponseResource.model_validate(made)
        assert made["output"] and made["status"] in ("completed", "incomplete")
    events = list(post([question], True))
    for event in events:
        words = "".join(word.capitalize() for word in re.split("[._]", event["type"]))
        TypeAdapter(getattr(spec, f"{words}StreamingEvent")).validate_python(event)
    ResponseResource.model_validate(events[-1]["response"])


# --- suites ---------------------------------------------------------------------------------------


def program(*command: str) -> str:
    """What a program of the clients' environment prints."""
    path = Path(sys.executable).with_name(command[0])
    ended = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def schemathesis(url: str, model: str) -> None:
    """No 5xx, no hang, no status, type or shape that the schema does not have."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    checks += ",response_schema_conformance"
    limits = ("--max-examples", "30", "--request-timeout", "60", "--seed", "1")
    where = f"{url}/openapi.json"
    said = program(
        "schemathesis", "run", where, *limits, "--checks", checks, "--phases", "coverage,fuzzing"
    )
    print(next(line for line in said.splitlines() if " generated, " in line).strip())


def lm_eval(url: str, model: str) -> None:
    """``local-completions`` gives the scores that ``openmythos eval`` gives."""
    task = Path(os.environ["TASK"])
    settings = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": os.environ["TOKENIZER"],
        "add_bos_token": "True",
        "max_length": "100",
    }
    given = ",".join(f"{name}={value}" for name, value in settings.items())
    out = str(task.parent / "scores")
    where = ("--include_path", str(task.parent), "--tasks", task.stem, "--output_path", out)
    program("lm_eval", "--model", "local-completions", "--model_args", given, *where)
    (found,) = Path(out).rglob("results*.json")
    score = json.loads(found.read_text())["results"][task.stem]["perplexity,none"]
    own = float(os.environ["OWN_SCORE"])
    assert abs(score / own - 1) < 1e-5, f"perplexity {score}; our own {own}"
    print(f"perplexity {score:.6g}; `openmythos eval` {own:.6g}")


def guidellm(url: str, model: str) -> None:
    """An outside load generator: 8 streams for 20 seconds."""
    with tempfile.TemporaryDirectory() as made:
        report = Path(made, "report.json")
        program(
            *("guidellm", "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={url},model={model}"),
            *("--profile", "kind=concurrent,streams=8"),
            *("--constraint", "kind=max_duration,seconds=20"),
            *("--tokenizer", f"kind=huggingface_auto,model={os.environ['TOKENIZER']}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--output", f"kind=json,path={report}"),
        )
        (run,) = json.loads(report.read_text())["benchmarks"]
    totals, metrics = run["metrics"]["request_totals"], run["metrics"]
    assert totals["successful"] > 0 and totals["errored"] == 0, totals
    first, between = metrics["time_to_first_token_ms"], metrics["inter_token_latency_ms"]
    shown = {
        "first token": first["successful"]["percentiles"],
        "inter-token": between["successful"]["percentiles"],
    }
    times = ", ".join(f"{n} {p['p50']:.0f} / {p['p99']:.0f} ms" for n, p in shown.items())
    print(f"{totals['successful']} answers, {totals['errored']} errors; p50 / p99: {times}")


CHECKS: dict[str, Callable[[str, str], None]] = {
    check.__name__: check
    for check in (
        openai_sync,
        openai_async,
        openai_errors,
        litellm,
        langchain,
        llm,
        open_responses,
        schemathesis,
        lm_eval,
        guidellm,
    )
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
