"""The server under load: many streams, many requests, clients that hang up, and its end.

    python -m benchmarks.serve_load CHECKPOINT [--out docs/serve_load.json]

Starts ``openmythos serve CHECKPOINT`` on this machine for each part: streams at once against each
request alone; memory over many requests; clients that hang up; SIGTERM under load. Fails if a
stream is lost, mixed or cut, if memory grows, or if anything is held for longer than a second.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from openmythos.folder import write_json

WORDS = ("the", "loop", "returns", "a", "list", "of", "names", "given", "to", "function", "value")
NEAR = 1e-3  # two tokens that are nearly as likely: sums in another order may decide between them
GROWTH = 0.02  # of memory over the second half of the requests


@dataclass
class Got:
    """What a client got of one stream."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    reason: str | None = None
    done: bool = False
    refused: bool = False
    margins: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def served(path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, subprocess.Popen[str]]]:
    """A server of its own process, and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "openmythos", "serve", str(path), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/ready")).status_code == 200:
                        break
                await asyncio.sleep(0.1)
            yield client, process
    finally:
        process.terminate()
        process.wait()


def body(number: int, tokens: int) -> dict[str, Any]:
    """A request of its own for every number."""
    prompt = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 7))
    return {"prompt": f"{number} {prompt}", "max_tokens": tokens, "temperature": 0, "logprobs": 2}


async def stream(client: httpx.AsyncClient, fields: dict[str, Any]) -> Got:
    """Read one stream to its end."""
    got, fields = Got(), {**fields, "stream": True}
    got.times.append(time.monotonic())
    try:
        async with client.stream("POST", "/v1/completions", json=fields) as answer:
            if answer.status_code != 200:
                got.refused = True
                return got
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    got.done = True
                elif line.startswith("data: "):
                    take(got, json.loads(line[6:])["choices"][0])
    except httpx.TransportError:
        got.refused = len(got.times) == 1
    return got


def take(got: Got, choice: dict[str, Any]) -> None:
    """Add an event to what was got."""
    got.times.append(time.monotonic())
    got.text += choice["text"]
    got.pieces.append(choice["text"])
    got.reason = choice["finish_reason"]
    for top in choice["logprobs"]["top_logprobs"]:
        best = sorted(top.values(), reverse=True)
        got.margins.append(best[0] - best[1] if len(best) > 1 else 1.0)


def compared(alone: Sequence[Got], together: Sequence[Got]) -> dict[str, int]:
    """How streams at once differ from each request alone."""
    counts = {"equal": 0, "lost": 0, "near_ties": 0, "mixed": 0}
    for one, other in zip(alone, together, strict=True):
        if not other.done or other.reason is None:
            counts["lost"] += 1
        elif one.text == other.text:
            counts["equal"] += 1
        else:
            near = one.margins and min(one.margins) < NEAR
            counts["near_ties" if near else "mixed"] += 1
    return counts


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ranked = sorted(values)
    places = {"p50": len(ranked) // 2, "p99": min(len(ranked) - 1, len(ranked) * 99 // 100)}
    return {name: round(1000 * ranked[place], 1) for name, place in places.items()}


async def streams(path: Path, count: int) -> dict[str, Any]:
    """Many streams at once, and each request alone."""
    async with served(path) as (client, _):
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        asked = [{**body(number, 24), "model": model} for number in range(count)]
        alone = [await stream(client, fields) for fields in asked]
        begun = time.monotonic()
        together = await asyncio.gather(*(stream(client, fields) for fields in asked))
        seconds = time.monotonic() - begun
    gaps = [b - a for got in together for a, b in zip(got.times[1:], got.times[2:], strict=False)]
    return {
        "streams": count,
        **compared(alone, together),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(len(got.margins) for got in together) / seconds, 1),
        "first_token_ms": quantiles([got.times[1] - got.times[0] for got in together]),
        "inter_token_ms": quantiles(gaps),
    }


async def memory(path: Path, count: int) -> dict[str, Any]:
    """Resident memory while many requests are answered, half of them streamed."""
    async with served(path) as (client, process):
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        gate, sizes = asyncio.Semaphore(48), []

        async def ask(number: int) -> None:
            async with gate:
                fields = {**body(number, 4), "model": model}
                if number % 2:
                    assert (await stream(client, fields)).done
                else:
                    (await client.post("/v1/completions", json=fields)).raise_for_status()

        for start in range(0, count, count // 10):
            await asyncio.gather(*(ask(start + number) for number in range(count // 10)))
            sizes.append(resident(process.pid))
    growth = sizes[-1] / sizes[len(sizes) // 2 - 1] - 1
    return {"requests": count, "resident_mb": sizes, "growth_of_second_half": round(growth, 4)}


def resident(pid: int) -> float:
    """A process' resident memory in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return round(int(line.split()[1]) / 1024, 1)


async def hang_ups(path: Path, count: int) -> dict[str, Any]:
    """Clients that hang up while the server computes, half of them without a stream."""
    async with served(path) as (client, _):
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        long = {"model": model, "max_tokens": 800, "ignore_eos": True}
        tasks = [
            asyncio.ensure_future(
                stream(client, {**body(number, 1), **long})
                if number % 2
                else client.post("/v1/completions", json={**body(number, 1), **long})
            )
            for number in range(count)
        ]
        while busy(await gauges(client)) < count:
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        begun, free = time.monotonic(), False
        while not free and time.monotonic() < begun + 60:
            now = await gauges(client)
            free = busy(now) == 0 and now["pages"] == now["pages_free"]
        return {"clients": count, "seconds_until_free": round(time.monotonic() - begun, 2)}


def busy(now: dict[str, float]) -> float:
    """The number of requests in the engine."""
    return now["requests_running"] + now["requests_waiting"]


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics that have no label but the model, by name."""
    lines = (await client.get("/metrics")).text.splitlines()
    named = (line.removeprefix("openmythos_").split("{model=") for line in lines)
    return {pair[0]: float(pair[1].split()[-1]) for pair in named if len(pair) == 2}


async def ending(path: Path, count: int) -> dict[str, Any]:
    """SIGTERM while many streams run: which were finished, and which refused."""
    async with served(path) as (client, process):
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        asked = [{**body(number, 24), "model": model} for number in range(count)]
        tasks = [asyncio.ensure_future(stream(client, fields)) for fields in asked]
        await asyncio.sleep(1)
        process.send_signal(signal.SIGTERM)
        got = await asyncio.gather(*tasks)
        status = await asyncio.to_thread(process.wait)
    whole = sum(one.done and one.reason is not None for one in got)
    refused = sum(one.refused for one in got)
    return {"streams": count, "whole": whole, "refused": refused, "exit_status": status}


def faults(found: dict[str, Any]) -> list[str]:
    """What must not be."""
    at_once, end = found["streams"], found["ending"]
    checks = {
        "streams were lost": at_once["lost"] == 0,
        "streams were mixed": at_once["mixed"] == 0,
        "memory grows": found["memory"]["growth_of_second_half"] <= GROWTH,
        "pages were held for more than a second": found["hang_ups"]["seconds_until_free"] <= 1,
        "streams were cut": end["whole"] + end["refused"] == end["streams"],
        "the server did not end well": end["exit_status"] == 0,
    }
    return [said for said, holds in checks.items() if not holds]


def main() -> int:
    """Measure, print and save; 1 if something must not be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="checkpoint or run folder")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    found = {}
    for part, count in (
        (streams, options.streams),
        (memory, options.requests),
        (hang_ups, options.streams),
        (ending, options.streams),
    ):
        found[part.__name__] = asyncio.run(part(options.path, count))
        print(part.__name__, json.dumps(found[part.__name__]), flush=True)
    if options.out is not None:
        write_json(options.out, found)
    for said in faults(found):
        print(f"fault: {said}", file=sys.stderr)
    return 1 if faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
