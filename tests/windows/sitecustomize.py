"""With this folder on PYTHONPATH, Python lacks what it lacks on Windows, in the processes that it starts, too.

What the standard library, filelock, psutil and PyTorch themselves need, which go by `sys.platform`, is left to them.
"""

import asyncio  # noqa: F401
import builtins
import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import traceback
import types
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

OF_OS = (
    "O_DIRECTORY fork forkpty getpgid getpgrp getsid killpg memfd_create nice register_at_fork sched_getaffinity "
    "setpgid setsid"
)
OF_SIGNAL = "SIGALRM SIGCHLD SIGCLD SIGHUP SIGKILL SIGUSR1 SIGUSR2 alarm pthread_kill setitimer"
MODULES = "fcntl grp pwd resource termios"
FOLDERS = ("/dev", "/proc", "/sys")
WHOLE = {  # what modules of PyTorch get as these modules: they ask for `sys.platform`, not for the names
    module: (name, types.SimpleNamespace(**vars(sys.modules[name])))
    for module, name in (
        ("torch.multiprocessing._atfork", "os"),
        ("torch.utils.data._utils.signal_handling", "signal"),
    )
}

_open, _open_file, _popen = os.open, io.open, subprocess.Popen.__init__


def _open_no_folder(path: Any, flags: int, *rest: Any, **options: Any) -> int:
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return _open(path, flags, *rest, **options)


def _open_no_system_file(path: Any, *rest: Any, **options: Any) -> Any:
    if not isinstance(path, int) and path != os.devnull and os.fsdecode(path).startswith(FOLDERS):
        raise FileNotFoundError(2, "No such file or directory", path)
    return _open_file(path, *rest, **options)


def _start(self: Any, *args: Any, **options: Any) -> None:
    if options.get("pass_fds") or options.get("preexec_fn"):
        raise ValueError("pass_fds and preexec_fn are not supported on Windows")
    _popen(self, *args, **options)


class _ForTorch:
    """Gives modules of PyTorch what `WHOLE` says."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in WHOLE else None
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_give(module: Any) -> None:
                run(module)
                setattr(module, *WHOLE[name])

            spec.loader.exec_module = run_and_give  # type: ignore[method-assign]
        return spec


def _take_away() -> None:
    for name in ("multiprocessing.popen_spawn_posix", "multiprocessing.resource_tracker"):
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module(name)
    import filelock  # noqa: F401
    import psutil

    psutil.PROCFS_PATH = "//proc"  # the same folder, by a name of its own
    sys.meta_path.insert(0, _ForTorch)  # type: ignore[arg-type]
    subprocess.Popen.__init__ = _start  # type: ignore[method-assign]
    if sys.platform != "win32":
        subprocess.Popen.kill = lambda self: self.send_signal(9)  # type: ignore[method-assign]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    os.open = _open_no_folder
    builtins.open = io.open = _open_no_system_file
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in MODULES.split():
        sys.modules[name] = None  # type: ignore[assignment]
    importlib.import_module("multiprocessing").set_start_method("spawn")


try:
    _take_away()
except BaseException:  # which Python would note, and continue with all that was to be missing
    traceback.print_exc()
    os._exit(1)
