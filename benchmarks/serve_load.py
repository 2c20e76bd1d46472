"""The server under load: many streams, many requests, clients that hang up, and its end.

    python -m benchmarks.serve_load CHECKPOINT [--only hang_ups] [--out benchmarks/serve_load.json]

Starts ``openmythos serve CHECKPOINT`` on this machine for each part: streams at once against each
request alone; memory over many requests; clients that hang up; SIGTERM under load. Fails if a
stream is lost, mixed or cut, if memory grows, or if anything is held for longer than a second.
Each part says on which processor, when and beside what load it was measured; ``--only`` replaces
that part of the file and keeps the others.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import torch

from openmythos.eval.exit_choice import processor_name
from openmythos.folder import write_json

WORDS = ("the", "loop", "returns", "a", "list", "of", "names", "given", "to", "function", "value")
NEAR = 1e-3  # two tokens that are nearly as likely: sums in another order may decide between them
LONG = 400  # tokens of an answer that nobody waits for; it fits into a small context
POLL = 0.02  # seconds between two looks at /metrics, which take some milliseconds each
SEEN = ("seconds_until_idle", "seconds_until_free")
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
    """Clients that hang up while the server computes, all with a stream, then all without one."""
    found: dict[str, Any] = {"clients": count, "poll_s": POLL}
    async with served(path) as (client, _):
        found["streaming"] = await hung_up(client, count, streaming=True)
        found["whole"] = await hung_up(client, count, streaming=False)
    return found


async def hung_up(client: httpx.AsyncClient, count: int, *, streaming: bool) -> dict[str, Any]:
    """Seconds from the last of the hang-ups until nothing runs, and until all pages are free.

    Each is the end of the first look at which it was so. Looks share one connection and leave the
    server alone between them; how many there were and what they took is told.
    """
    model = (await client.get("/v1/models")).json()["data"][0]["id"]
    long = {"model": model, "max_tokens": LONG, "ignore_eos": True}
    asked = [{**body(number, 1), **long} for number in range(count)]
    calls = [
        stream(client, fields) if streaming else client.post("/v1/completions", json=fields)
        for fields in asked
    ]
    tasks = [asyncio.ensure_future(call) for call in calls]
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as watcher:
        while busy(await gauges(watcher)) < count:
            assert not any(task.done() for task in tasks), "an answer ended before its client did"
            await asyncio.sleep(POLL)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        begun, looks, seen = time.monotonic(), [], dict[str, float]()
        while len(seen) < 2 and time.monotonic() < begun + 60:
            started = time.monotonic()
            now = await gauges(watcher)
            ended = time.monotonic()
            looks.append(ended - started)
            if busy(now) == 0:
                seen.setdefault("seconds_until_idle", round(ended - begun, 3))
            if now["pages"] == now["pages_free"]:
                seen.setdefault("seconds_until_free", round(ended - begun, 3))
            await asyncio.sleep(POLL)
    look_ms = round(1000 * sum(looks) / len(looks), 1)
    return {**dict.fromkeys(SEEN, 60.0), **seen, "looks": len(looks), "look_ms": look_ms}


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
    """What must not be, in the parts that were measured."""
    said = []
    if at_once := found.get("streams"):
        said += ["streams were lost"] * (at_once["lost"] > 0)
        said += ["streams were mixed"] * (at_once["mixed"] > 0)
    if memory_of := found.get("memory"):
        said += ["memory grows"] * (memory_of["growth_of_second_half"] > GROWTH)
    for kind in ("streaming", "whole"):
        times = found.get("hang_ups", {}).get(kind, {})
        late = max((times[name] for name in SEEN if name in times), default=0.0)
        said += [f"{kind}: work or pages were held for {late} s"] * (late > 1)
    if end := found.get("ending"):
        said += ["streams were cut"] * (end["whole"] + end["refused"] != end["streams"])
        said += ["the server did not end well"] * (end["exit_status"] != 0)
    return said


def measured_on(path: Path, load_before: Sequence[float]) -> dict[str, Any]:
    """Where, when and beside what a part was measured."""
    return {
        "checkpoint": str(path),
        "processor": processor_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": [round(value, 2) for value in load_before],
        "load_after": [round(value, 2) for value in os.getloadavg()],
    }


def main() -> int:
    """Measure, print and save; 1 if something must not be."""
    parts = {part.__name__: part for part in (streams, memory, hang_ups, ending)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="checkpoint or run folder, or zoo:NAME")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--only", choices=parts, help="one of the parts")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in [options.only] if options.only else parts:
        load = os.getloadavg()
        count = options.requests if name == "memory" else options.streams
        found[name] = asyncio.run(parts[name](options.path, count))
        found[name]["measured"] = measured_on(options.path, load)
        print(name, json.dumps(found[name]), flush=True)
    if options.out is not None:
        kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
        write_json(options.out, {**kept, **found})
    for said in faults(found):
        print(f"fault: {said}", file=sys.stderr)
    return 1 if faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
