"""Starts commands in processes of their own: as a user does, or forked from one that has imported torchtune already.

To import what torchtune imports takes seven seconds of CPU, and a small run half a second. A process that has done it
once (for the whole session) and nothing else forks one for each command, which finds them done. All else is as in a
process that Python starts: script, arguments, folder, path and environment; flash_plugin is not imported before. One
command of each kind is still started afresh, to test that too.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
# Console scripts of this environment, which pytest may run without having activated it.
TUNE, TORCHRUN, LM_EVAL = (str(Path(sys.executable).parent / name) for name in ("tune", "torchrun", "lm_eval"))
TIMEOUT = 600

# Nothing here starts a thread of Python's or torch's, which would not be there in what is forked.
_IMPORTED = [
    *("torchtune._cli.tune", "torchtune.training", "torchtune.models.llama3_2", "torchdata.stateful_dataloader"),
    *("torch._inductor.compile_fx", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks"),
]
# How multiprocessing starts what shall find them imported.
SOONER = "forkserver"
_context = multiprocessing.get_context(SOONER)
_context.set_forkserver_preload(_IMPORTED)


class Forked:
    """A forked process, with what these tests want of a ``Popen``."""

    def __init__(self, *arguments: Any) -> None:
        self._process = _context.Process(target=_enter, args=(*arguments, _path_of_python()))
        with patch.object(sys, "path", [*sys.path, str(ROOT)]):  # where it finds this module
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or math.inf)
        return status


def start(
    *command: str, cwd: Path, stdout: Path, stderr: Path, afresh: bool = False
) -> subprocess.Popen[bytes] | Forked:
    """Start a Python script with its arguments, ``afresh`` by Python itself; what it prints is added to the files."""
    if not afresh:
        return Forked(command, cwd, dict(os.environ), stdout, stderr)
    with stdout.open("ab") as out, stderr.open("ab") as error:
        return subprocess.Popen([sys.executable, *command], cwd=cwd, env=os.environ, stdout=out, stderr=error)


def run(*command: str, cwd: Path, afresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a Python script with its arguments to its end."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        started = start(*command, cwd=cwd, stdout=stdout, stderr=stderr, afresh=afresh)
        try:
            status = started.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            kill(started.pid)
            raise AssertionError(f"{command} hangs: {stdout.read_text()}{stderr.read_text()}"[-4000:]) from None
        return subprocess.CompletedProcess(command, status, stdout.read_text(), stderr.read_text())


def tune(*arguments: str, cwd: Path, fails: bool = False, afresh: bool = False) -> str:
    """Run ``tune run`` in ``cwd``; return what it printed."""
    return printed(run(TUNE, "run", *arguments, cwd=cwd, afresh=afresh), fails=fails)


def printed(done: subprocess.CompletedProcess[str], *, fails: bool = False) -> str:
    """What a command printed that was to end well, or to fail."""
    everything = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, everything[-4000:]
    return everything


def family(pid: int) -> list[int]:
    """The process and all below it: a launcher's workers lead sessions of their own."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has ended since
                found.extend(map(int, children.read_text().split()))
    return found


def kill(pid: int) -> None:
    """Kill the process and all below it."""
    for one in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


@functools.cache
def _path_of_python() -> list[str]:
    """Where Python looks for modules before anything is imported, some of which add to it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ask = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    path: list[str] = json.loads(subprocess.check_output(ask, env=environment))
    return path


def _enter(
    command: tuple[str, ...], cwd: Path, environment: dict[str, str], stdout: Path, stderr: Path, path: list[str]
) -> None:
    """Become, in a forked process, what Python would be that has started the script."""
    gc.freeze()  # what is there already stays there: to look through it again and again takes time, and copies it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for output, descriptor in ((stdout, 1), (stderr, 2)):
        with output.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(Path(command[0]).parent), *dict.fromkeys([*given, *path])]
    sys.argv = list(command)
    _let_torchrun_fork(sys.path[1:])
    _let_studies_fork()
    runpy.run_path(command[0], run_name="__main__")


def _let_torchrun_fork(path: list[str]) -> None:
    """Let torchrun fork its workers too, where it would start Python for each."""
    from torch.distributed import run as torchrun

    config_from_args = torchrun.config_from_args

    def work(*command: str) -> None:
        sys.path[:] = [str(Path(command[0]).parent), *path]
        sys.argv = list(command)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            # torchrun would wait for ever for what a function returns that ends so.
            if end.code:
                raise

    def forking(arguments: Any) -> Any:
        arguments.start_method = "fork"
        config, _, (_, *script) = config_from_args(arguments)  # without Python and its option
        return config, work, script

    torchrun.config_from_args = forking


def _let_studies_fork() -> None:
    """Let a script that runs ``tune`` fork it too."""
    # Python 3.11 would start another server, for want of a child process that is one: ours is a brother.
    forkserver.ForkServer.ensure_running = lambda self: None  # type: ignore[method-assign]
    plain = subprocess.run

    def forking(command: Any, **options: Any) -> Any:
        if command[0] != TUNE:
            return plain(command, **options)
        file = options.get("stdout")
        files = [file, file] if file else [sys.stdout, sys.stderr]
        paths = [Path(os.readlink(f"/proc/self/fd/{file.fileno()}")) for file in files]
        status = Forked(tuple(command), Path.cwd(), options["env"], *paths).wait()
        done = subprocess.CompletedProcess(command, status)
        if options["check"]:
            done.check_returncode()
        return done

    subprocess.run = forking
