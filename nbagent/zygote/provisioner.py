# SPDX-License-Identifier: BSD-3-Clause
"""Starts kernels by fork: jupyter_client's KernelProvisioner for a slot that has a fork server.

jupyter_client finds it by an entry point, like any provisioner. A slot sees the package nbagent without the .dist-info
directory of an installation, so `register` adds this one distribution to importlib.metadata. `use` sets the fork
server.

It forks a kernel whose command is that of the ordinary Python kernel, run by the server's own Python under any name in
its directory, and whose environment is like the server's. It starts every other kernel by exec: one of another
kernelspec or Python; one with arguments, streams or variables that Python reads only when it starts; one that would
import a package that the user has installed over a loaded one (nbagent.zygote.installed). It also starts a kernel by
exec, and logs a warning, when the fork server has ended or the fork failed.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import Distribution, DistributionFinder
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Protocol

from jupyter_client.provisioning import LocalProvisioner

from nbagent.zygote import installed
from nbagent.zygote.forkserver import ForkFailed

NAME = "nbagent-forkserver"
GROUP = "jupyter_client.kernel_provisioners"
# Variables that are read only when a program starts: by the dynamic loader, the C library, Python and thread pools.
START_VARIABLES = ("PYTHON", "LD_", "LC_", "LANG", "GLIBC_", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_", "VIRTUAL_ENV")
# Options of launch_kernel that do not affect a fork, or that the order to the fork server contains.
LAUNCH_OPTIONS = frozenset({"env", "cwd", "kernel_id", "extra_arguments"})


class Forker(Protocol):
    """Forks kernels: a `ForkServerClient`, or during the zygote's warm-up a `warmup.FakeForkServer`."""

    exclusive: bool  # whether a kernel that cannot be forked fails instead of being started by exec

    @property
    def alive(self) -> bool: ...

    async def fork(self, order: Mapping[str, Any]) -> Any: ...


_forkserver: Optional[Forker] = None
_apply_limits: Optional[Callable[..., None]] = None


def use(forkserver: Optional[Forker]) -> None:
    """Sets the fork server of this process's kernels; with None all kernels are started by exec."""
    global _forkserver
    _forkserver = forkserver


def use_limits(apply: Callable[..., None]) -> None:
    """Sets the function that sets the variables for the slot's limits in environments."""
    global _apply_limits
    _apply_limits = apply


class ForkServerProvisioner(LocalProvisioner):
    """A LocalProvisioner whose process may be forked from the fork server."""

    async def launch_kernel(self, cmd: List[str], **options: Any) -> Any:
        """Launches a kernel: by fork where the result is the same, else by exec of `cmd`."""
        global _forkserver
        # Also in the environment of a restart, which is that of the kernel's first start.
        if _apply_limits is not None:
            _apply_limits(os.environ, *([options["env"]] if "env" in options else []))
        order = _order(cmd, options) if _forkserver is not None else None
        if _forkserver is not None and order is None and _forkserver.exclusive:
            raise RuntimeError(f"the kernel {cmd} cannot be forked")
        if _forkserver is not None and order is not None:
            try:
                if not _forkserver.alive:
                    _forkserver = None
                    raise ForkFailed("the fork server has ended")
                self.process = process = await _forkserver.fork(order)
            except ForkFailed as error:
                self.log.warning("Kernel started by exec instead of fork: %s", error)
            else:
                # The kernel leads its own session and process group, as one started by launch_kernel does.
                self.pid = self.pgid = process.pid
                self.cwd = options.get("cwd", os.getcwd())
                await process.bound()
                return self.connection_info
        return await super().launch_kernel(cmd, **options)


def _order(cmd: List[str], options: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The order to the fork server for this kernel; None if the kernel has to be started by exec."""
    environment = options.get("env", os.environ)
    ordinary = [word for word in cmd if word != "-Xfrozen_modules=off"]
    if (
        len(ordinary) != 5
        or ordinary[1:4] != ["-m", "ipykernel_launcher", "-f"]
        or not _is_this_python(ordinary[0])
        or set(options) - LAUNCH_OPTIONS
        or any(
            environment.get(name) != os.environ.get(name)
            for name in {*environment, *os.environ}
            if name.startswith(START_VARIABLES)
        )
        or installed.over_loaded()
    ):
        return None
    return {
        "command": list(cmd),
        "connection_file": ordinary[4],
        "cwd": os.fspath(options.get("cwd") or os.getcwd()),
        "environment": dict(environment),
    }


def _is_this_python(program: str) -> bool:
    """Whether `program` is the server's own Python: the same file in the same directory, which determines the venv."""
    try:
        return os.path.dirname(program) == os.path.dirname(sys.executable) and os.path.samefile(program, sys.executable)
    except OSError:
        return False


class _Distribution(Distribution):
    """The metadata of this package with its entry point, as an installation would write it."""

    def read_text(self, filename: str) -> Optional[str]:
        return {
            "METADATA": "Metadata-Version: 2.1\nName: nbagent\nVersion: 0\n",
            "entry_points.txt": f"[{GROUP}]\n{NAME} = {__name__}:{ForkServerProvisioner.__name__}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


class _Finder(DistributionFinder):
    """Finds the one distribution, and no modules."""

    def find_spec(self, *_args: Any) -> None:
        return None

    def find_distributions(self, context: Any = DistributionFinder.Context()) -> Iterable[Distribution]:  # noqa: B008
        return [_Distribution()] if context.name in (None, "nbagent") else []


def register() -> None:
    """Makes the entry point known in this process; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())



def unregister() -> None:
    """Makes the entry point unknown in this process, which is a kernel."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
