"""Starts kernels by fork: jupyter_client's KernelProvisioner for a slot that has a seed.

It is found as any provisioner is, by an entry point. A slot sees the package nbagent without the .dist-info of an
installation, so `register` tells importlib.metadata of this one distribution; `use` says which seed to ask.

It forks what is the ordinary kernel of the server's own Python, by whatever name in its directory, in an environment
like the server's. Every other kernel starts the ordinary way: another kernelspec or Python; a start with arguments,
streams or variables that Python reads only when it starts; a package that the user has installed over one that is
loaded already, which a fork would not see; a seed that has died, or a fork that failed. The latter two are logged.
"""

from __future__ import annotations

import os
import site
import sys
from importlib.metadata import Distribution, DistributionFinder
from typing import Any, Dict, Iterable, List, Mapping, Optional, Protocol

from jupyter_client.provisioning import LocalProvisioner

from nbagent.zygote.forkserver import ForkFailed

NAME = "nbagent-forkserver"
GROUP = "jupyter_client.kernel_provisioners"
# How a program's start is arranged by its environment: the dynamic loader, the C library, Python, thread pools.
START_VARIABLES = ("PYTHON", "LD_", "LC_", "LANG", "GLIBC_", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_", "VIRTUAL_ENV")
# What launch_kernel is given that makes no difference to a fork, or that an order carries.
LAUNCH_OPTIONS = frozenset({"env", "cwd", "kernel_id", "extra_arguments"})


class Source(Protocol):
    """Where forked kernels come from: a `ForkServerClient`, and in the zygote's rehearsal its understudy."""

    exclusive: bool  # whether a kernel that it cannot fork does not start at all

    @property
    def alive(self) -> bool: ...

    async def fork(self, order: Mapping[str, Any]) -> Any: ...


_seed: Optional[Source] = None


def use(seed: Optional[Source]) -> None:
    """Says which seed kernels of this server are forked from; None for none."""
    global _seed
    _seed = seed


class SeedProvisioner(LocalProvisioner):
    """As LocalProvisioner, but the process may be a fork of the seed's."""

    async def launch_kernel(self, cmd: List[str], **options: Any) -> Any:
        """Launches a kernel: by fork when that is the same, else with the command."""
        global _seed
        order = _order(cmd, options) if _seed is not None else None
        if _seed is not None and order is None and _seed.exclusive:
            raise RuntimeError(f"{cmd} is a kernel that cannot be forked")
        if _seed is not None and order is not None:
            try:
                if not _seed.alive:
                    _seed = None
                    raise ForkFailed("the seed has died")
                self.process = process = await _seed.fork(order)
            except ForkFailed as failed:
                self.log.warning("Kernel is started the ordinary way: %s", failed)
            else:
                # The leader of a session and a group of its own, as launch_kernel makes it.
                self.pid = self.pgid = process.pid
                self.cwd = options.get("cwd", os.getcwd())
                await process.bound()
                return self.connection_info
        return await super().launch_kernel(cmd, **options)


def _order(cmd: List[str], options: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """What to tell the seed; None when the kernel has to start the ordinary way."""
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
        or _shadowed()
    ):
        return None
    return {
        "connection_file": ordinary[4],
        "cwd": os.fspath(options.get("cwd") or os.getcwd()),
        "environment": dict(environment),
    }


def _is_this_python(program: str) -> bool:
    """Whether it is the server's own Python: the same file in the same directory, by which Python knows a venv."""
    try:
        return os.path.dirname(program) == os.path.dirname(sys.executable) and os.path.samefile(program, sys.executable)
    except OSError:
        return False


def _shadowed() -> bool:
    """Whether the user has installed what a new Python would load instead of, or before, what is loaded."""
    try:
        names = os.listdir(site.getusersitepackages())
    except OSError:
        return False
    if not names:
        return False
    loaded = {name.partition(".")[0] for name in sys.modules} | {"sitecustomize", "usercustomize"}
    return any(name.endswith(".pth") or name.partition(".")[0] in loaded for name in names)


class _Distribution(Distribution):
    """The entry point, as an installation of this package would have it in its metadata."""

    def read_text(self, filename: str) -> Optional[str]:
        return {
            "METADATA": "Metadata-Version: 2.1\nName: nbagent\nVersion: 0\n",
            "entry_points.txt": f"[{GROUP}]\n{NAME} = {__name__}:{SeedProvisioner.__name__}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


class _Finder(DistributionFinder):
    """Finds no module, and the one distribution."""

    def find_spec(self, *_args: Any) -> None:
        return None

    def find_distributions(self, context: Any = DistributionFinder.Context()) -> Iterable[Distribution]:  # noqa: B008
        return [_Distribution()] if context.name in (None, "nbagent") else []


def register() -> None:
    """Makes the entry point known in this process; again is nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

