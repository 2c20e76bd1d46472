"""The program in processes of their own, which can be killed.

A forked process begins with everything imported, and so within milliseconds; the process that
forks trains nothing and loads no kernels itself. A fresh one is a new interpreter.
"""
# The imports that nothing here uses are what commands import when they run.
# ruff: noqa: F401

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch._dynamo

import openmythos.engine.reference
import openmythos.eval.score
import openmythos.interop.export
import openmythos.train.display
import openmythos.train.run
from openmythos import cli

HANGS_AFTER = 300.0  # seconds
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, or minus a signal, and all that it said."""

    status: int
    said: str

    @property
    def refused(self) -> bool:
        """One clear line, as for every error of a user."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return self.status == 2 and len(errors) == 1 and "Traceback" not in self.said

    @property
    def answer(self) -> object:
        """The JSON that it printed, or None."""
        for line in self.said.splitlines():
            if line.startswith(("[", "{")):
                return json.loads(line)
        return None


class Process:
    """``openmythos`` with some arguments, or a function, running.

    Args:
        work: The arguments, or the function to call.
        log: The file of what it says.
        fresh: Whether a new interpreter runs it.
        file_limit: The most bytes that one file may have; None: no limit.
    """

    def __init__(
        self,
        work: list[object] | Callable[[], object],
        log: Path,
        *,
        fresh: bool = False,
        file_limit: int | None = None,
    ) -> None:
        self.log, self._status = log, None
        if callable(work) or not fresh:
            self.pid = os.fork()
            if self.pid == 0:
                _run(work, log, file_limit)
            return
        words = [sys.executable, "-m", "openmythos", *map(str, work)]
        with log.open("wb") as file:
            self.pid = subprocess.Popen(words, stdout=file, stderr=file).pid

    def poll(self) -> int | None:
        """The exit status, or None while it is running."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def kill(self) -> Ended:
        """Kill it at once; it may have ended before."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for its end; a process that hangs is killed."""
        deadline = time.monotonic() + HANGS_AFTER
        while self.poll() is None:
            time.sleep(0.005)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
        status = self.poll()
        assert status is not None
        return Ended(status, self.log.read_text(encoding="utf-8", errors="replace"))

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until something is so, or the process has ended."""
        while self.poll() is None and not ready():
            time.sleep(0.0005)

    def holds(self, folder: Path) -> bool:
        """Whether it has the lock of a folder."""
        try:
            holder = (folder / ".lock").read_text(encoding="utf-8")
        except OSError:
            return False
        return holder.startswith(f"process {self.pid} ")


def run(work: list[object] | Callable[[], object], log: Path, **options: object) -> Ended:
    """Run to the end."""
    return Process(work, log, **options).wait()  # type: ignore[arg-type]


def _run(work: list[object] | Callable[[], object], log: Path, file_limit: int | None) -> None:
    """What a forked process does; it never returns."""
    status = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        if file_limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        status = _call(work)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _call(work: list[object] | Callable[[], object]) -> int:
    if not callable(work):
        sys.argv = ["openmythos", *map(str, work)]
    try:
        answer = work() if callable(work) else cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        said = cli.fault_of_user(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    if callable(work):
        print(json.dumps(answer))
    return 0
