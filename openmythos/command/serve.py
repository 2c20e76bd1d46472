"""``openmythos serve``: an HTTP server that speaks OpenAI's API."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openmythos.command.decoding import load
from openmythos.command.option import Device, Weights

if TYPE_CHECKING:
    from openmythos.eval.exit_choice import ExitChoice
    from openmythos.model.recurrent import RecurrentDepthLM

KEY_VARIABLE = "OPENMYTHOS_API_KEY"
FIRST = "zoo:walks"  # of the models that ship, on the page

Paths = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Checkpoint or run folders, or zoo:NAME; the name of each is its model's. Default: "
        "the models that ship."
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]
Keys = Annotated[
    Path | None,
    typer.Option(
        help=f"File of keys, one per line, of which a client must give one; or set {KEY_VARIABLE}."
    ),
]
MaxRows = Annotated[int, typer.Option(help="Most requests that are computed at once.", min=1)]
MaxWaiting = Annotated[int, typer.Option(help="Most requests that wait beyond those.", min=0)]
MaxLoops = Annotated[
    int | None, typer.Option(help="Most loops per token; default: twice the model's own.", min=1)
]
MaxLen = Annotated[int | None, typer.Option(help="Most tokens of a prompt and its answer.", min=2)]
Pages = Annotated[
    int | None, typer.Option(help="Pages of the cache, of 16 tokens; default: as memory allows.")
]
Timeout = Annotated[float, typer.Option(help="Seconds after which an answer is cut short.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Wait for the compiler, then decode faster.")
]

Fair = Annotated[
    str,
    typer.Option(
        help="'sum': most tokens per second in all; 'deep': requests with few loops hold up those "
        "with more only a little."
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Logits equal to the last bit whatever else is computed; a few requests cost as "
        "much as 16.",
    ),
]


def serve(
    paths: Paths = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: Keys = None,
    max_rows: MaxRows = 32,
    max_waiting: MaxWaiting = 256,
    max_loops: MaxLoops = None,
    max_len: MaxLen = None,
    num_pages: Pages = None,
    timeout: Timeout = 600.0,
    compiled: Compiled = False,
    fair: Fair = "sum",
    batch_invariant: BatchInvariant = False,
    device: Device = "cpu",
    weights: Weights = "stored",
) -> None:
    """Serve models over HTTP as OpenAI's API does, with depth per request."""
    paths = paths or shipped()
    names = [path.resolve().name.removeprefix("zoo:") for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the folders have the same name: {', '.join(sorted(names))}")
    keys = keys_of(api_key_file)
    typer.echo(f"loading {', '.join(names)} ...", err=True)
    require_web()
    from openmythos.engine.engine import Engine, EngineConfig
    from openmythos.serve.metrics import Metrics
    from openmythos.serve.served import ServedModel
    from openmythos.serve.server import serve as run
    from openmythos.serve.worker import EngineThread

    metrics, models = Metrics(), []
    for name, path in zip(names, paths, strict=True):
        model, codec = load(path, device, weights)
        deepest = 2 * model.config.num_loops if max_loops is None else max_loops
        config = EngineConfig(
            max_rows=max_rows,
            max_len=max_len,
            max_loops=deepest,
            num_pages=num_pages,
            compiled=compiled,
            fair=fair,  # type: ignore[arg-type]  # checked there
            batch_invariant=batch_invariant,
        )
        engine = Engine(model, config)
        engine.warm_up()
        measured = metrics.of(name, lambda engine=engine: engine.stats)  # type: ignore[misc]
        worker = EngineThread(engine, measured, max_waiting=max_waiting)
        created = int(time.time())
        choice = choice_for(path, model)
        served = ServedModel(
            name,
            model,
            codec,
            worker,
            default_rule=None if choice is None else choice.exit_rule,
            default_loops=None if choice is None else choice.num_loops,
            created=created,
            timeout=timeout,
        )
        models.append(served)
        typer.echo(f"{name}: {served.max_len} tokens, up to {deepest} loops", err=True)
    if not keys and host not in ("127.0.0.1", "localhost", "::1"):
        typer.echo(f"warning: anyone who reaches {host} can use it; give keys", err=True)
    typer.echo(f"listening on http://{host}:{port}", err=True)
    run(models, metrics, host=host, port=port, keys=keys)


def shipped() -> list[Path]:
    """The models that ship."""
    from openmythos.interop.hub import zoo_names

    return [Path(name) for name in sorted(zoo_names(), key=lambda name: (name != FIRST, name))]


def choice_for(path: Path, model: "RecurrentDepthLM") -> "ExitChoice | None":
    """The depth and exit rule that ``calibrate-exit`` chose for a checkpoint, if it did.

    Raises:
        ValueError: Its file is damaged, or of another model.
    """
    from openmythos.checkpoint.save import EXIT_FILE
    from openmythos.engine.request import Request
    from openmythos.eval.exit_choice import processor_name, read_choice
    from openmythos.interop.hub import local_folder

    folder = local_folder(path)
    choice = read_choice(folder)
    if choice is None:
        return None
    try:
        Request(tokens=[0], max_new_tokens=1, exit_rule=choice.exit_rule).check(model.config)
    except ValueError as error:
        raise ValueError(f"{folder / EXIT_FILE} is of another model: {error}") from None
    typer.echo(f"{path}: {choice}, as measured by calibrate-exit", err=True)
    here = processor_name(model.embed.weight.device)
    if choice.processor != here:
        said = (
            f"warning: {folder / EXIT_FILE} was measured on {choice.processor}, and this is {here}"
        )
        typer.echo(f"{said}; run openmythos calibrate-exit again", err=True)
    return choice


def keys_of(file: Path | None) -> list[str]:
    """The keys in a file, one per line, or in the environment; empty: none is needed.

    Raises:
        ValueError: The file holds none.
    """
    if file is None:
        return [key for key in [os.environ.get(KEY_VARIABLE, "").strip()] if key]
    keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    keys = [key for key in keys if key]
    if not keys:
        raise ValueError(f"--api-key-file {file} holds no key; write one per line")
    return keys


def require_web() -> None:
    """Check that what the server needs is installed.

    Raises:
        ValueError: It is not; says how to install it.
    """
    import importlib.util

    needed = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'serve needs {", ".join(missing)}; run: pip install "openmythos[serve]"')
