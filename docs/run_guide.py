"""Runs the guide as a reader does, and keeps its pictures: ``python -m docs.run_guide``.

Every command and every block of Python is a process of its own, in one folder that begins empty. A
server runs until its page ends. Printed are the seconds of each page, and those of the processor,
which other work on the machine changes less; the pictures go to their places in ``docs/guide``.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from docs.page_code import GUIDE, ROOT, blocks_of, commands_of, pictures_of

SERVER = "http://127.0.0.1:8000"
SERVE = "openmythos serve"


def wait_for(server: "subprocess.Popen[bytes]", url: str, seconds: float = 120) -> None:
    """Wait until a server answers.

    Raises:
        RuntimeError: It ended, or did not answer in time.
    """
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer")


def run_page(page: str, folder: Path, program: Path, log: Path) -> float:
    """Run all of a page in a folder; the seconds that it took.

    Args:
        page: Its place in the repository.
        folder: Where a reader would be.
        program: The folder of ``python`` and ``openmythos``.
        log: A file that gets what was said.

    Raises:
        SystemExit: A command failed.
    """
    environment = {**os.environ, "PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}
    start, servers = time.monotonic(), []
    with log.open("w", encoding="utf-8") as said:
        given = {"cwd": folder, "env": environment, "stdout": said, "stderr": subprocess.STDOUT}
        try:
            for command in commands(page):
                print(f"\n$ {command[-1]}", file=said, flush=True)
                if command[-1].startswith(SERVE):
                    words = ["bash", "-c", f"exec {command[-1]}"]
                    servers.append(subprocess.Popen(words, **given))
                    wait_for(servers[-1], f"{SERVER}/ready")
                elif subprocess.run(command, check=False, **given).returncode:
                    sys.exit(f"error: {page}: this failed, see {log}\n{command[-1]}")
        finally:
            for server in servers:
                server.terminate()
                server.wait()
    return time.monotonic() - start


def commands(page: str) -> Iterator[list[str]]:
    """What a reader of a page runs, as words of a process."""
    for block in blocks_of((ROOT / page).read_text(encoding="utf-8")):
        if block.reason is None and block.language == "bash":
            yield from (["bash", "-c", line] for line in commands_of(block.text))
        elif block.reason is None and block.language == "python":
            yield ["python", "-c", block.text]


def processor_seconds() -> float:
    """Seconds that the processes which ended so far have computed, on all cores together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the pages and keep their pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build/guide")
    parser.add_argument("--program", type=Path, default=Path(sys.executable).parent)
    parser.add_argument("--only", help="pages whose name has this in it; the folder is kept")
    given = parser.parse_args()
    if not given.only:
        shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    for page in (page for page in GUIDE if (given.only or "") in page):
        name = Path(page).stem
        log = given.folder / f"{name}.log"
        before = processor_seconds()
        seconds = run_page(page, given.folder.resolve(), given.program.resolve(), log)
        computed = processor_seconds() - before
        print(f"{name}: {seconds:.0f} s, {computed:.0f} of them computing", flush=True)
        for picture, made in pictures_of((ROOT / page).read_text(encoding="utf-8")).items():
            if (given.folder / made).is_file():
                shutil.copy(given.folder / made, ROOT / "docs/guide" / picture)


if __name__ == "__main__":
    main()
