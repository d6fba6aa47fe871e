# SPDX-License-Identifier: BSD-3-Clause
"""Answers of the server that are computed once for all slots of an image: settings, kernels, translations, exporters.

JupyterLab requests them when it opens, and the one-threaded server takes 20 to 500 ms for each. They depend on files
that a slot's user has rarely changed by then. An answer is kept with the state of these files, and computed again when
one of them has changed. The zygote's warm-up requests them, so that a forked slot has them.

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from tornado import web

# Files of one directory beyond this number are not compared; the answer is then computed each time.
FILES_MAX = 2000
OWN_PATH = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# JupyterLab's settings are four levels deep, kernels two.
DEPTH_MAX = 5

# The files on which an answer depends: the name of each with its time of change and size.
State = Tuple[Tuple[str, int, int], ...]


def keep_answers() -> None:
    """Lets the handlers of the image's server keep their answers. A handler that the image lacks is left out."""
    for module, name, key, directories in (
        ("jupyterlab_server.settings_handler", "SettingsHandler", _settings_key, _of_settings),
        ("jupyterlab_server.translations_handler", "TranslationsHandler", _translations_key, _of_translations),
        ("jupyter_server.services.kernelspecs.handlers", "MainKernelSpecHandler", _only_key, _of_kernels),
        ("jupyter_server.services.nbconvert.handlers", "NbconvertRootHandler", _only_key, _of_packages),
    ):
        with contextlib.suppress(ImportError, AttributeError):
            handler = getattr(importlib.import_module(module), name)
            handler.get = Answers(handler.get, key, directories).method()


class Answers:
    """The answers of one handler's `get`, by `key`: None for a request whose answer is not kept."""

    def __init__(
        self, get: Callable[..., Any], key: Callable[..., Optional[str]],
        directories: Callable[[Any], Iterable[Tuple[str, int]]],
    ) -> None:
        self._get, self._key, self._directories = get, key, directories
        # The text and the Content-Type. Lists, because the zygote replaces its own address in the lists and dicts that
        # the garbage collector tracks, and a dict of texts only is not tracked.
        self.texts: Dict[str, List[str]] = {}
        self.states: Dict[str, State] = {}

    def method(self) -> Callable[..., Any]:
        """The handler's new `get`."""

        async def get(handler: Any, *arguments: Any, **named: Any) -> None:
            key = self._key(handler, *arguments, **named)
            state = None if key is None else state_of(self._directories(handler))
            if key is None or state is None:
                await _finished(self._get(handler, *arguments, **named))
            elif self.states.get(key) == state:
                text, content_type = self.texts[key]
                handler.set_header("Content-Type", content_type)
                handler.finish(text)
            else:
                await self._keep(handler, functools.partial(self._get, handler, *arguments, **named), key, state)

        # The handler's own check is in the method that is not called for a kept answer. Every request of a slot has one
        # identity, so that a check of permissions beyond the login has the same result each time.
        checked: Callable[..., Any] = web.authenticated(get)
        return checked

    async def _keep(self, handler: Any, compute: Callable[[], Any], key: str, state: State) -> None:
        bodies: List[Any] = []
        finish = handler.finish

        def record(chunk: Any = None, *more: Any, **options: Any) -> Any:
            bodies.append(chunk)
            return finish(chunk, *more, **options)

        handler.finish = record
        await _finished(compute())
        if handler.get_status() == 200 and len(bodies) == 1 and isinstance(bodies[0], str):
            self.texts[key] = [bodies[0], handler._headers.get("Content-Type", "application/json")]
            self.states[key] = state


async def _finished(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


def state_of(directories: Iterable[Tuple[str, int]]) -> Optional[State]:
    """The state of directories, each with the depth to which its files matter; None if there are too many."""
    found: List[Tuple[str, int, int]] = []
    for directory, depth in directories:
        for path, status in _below(directory, depth):
            found.append((path, status.st_mtime_ns, status.st_size))
            if len(found) > FILES_MAX:
                return None
    return tuple(found)


def _below(path: str, depth: int) -> Iterator[Tuple[str, os.stat_result]]:
    try:
        # Links are followed, because the server follows them; `depth` ends a circle.
        status = os.stat(path)
        yield path, status
        names = sorted(os.listdir(path)) if depth else []
    except OSError:  # absent, a file, or not readable
        return
    for name in names:
        yield from _below(os.path.join(path, name), depth - 1)


def _only_key(_handler: Any) -> Optional[str]:
    return ""


def _settings_key(handler: Any, schema_name: str = "") -> Optional[str]:
    return f"{schema_name}?ids_only={handler.get_argument('ids_only', '') == 'true'}"


def _translations_key(_handler: Any, locale: Optional[str] = None) -> Optional[str]:
    # The answer for another language also changes the server's language.
    return (locale or "") if locale in (None, "", "default") else None


def _of_packages(_handler: Any) -> Iterator[Tuple[str, int]]:
    # An installation of a package changes the time of a directory of sys.path. nbagent's own is made for each slot.
    yield from ((path, 0) for path in sys.path if path != OWN_PATH)


def _of_settings(handler: Any) -> Iterator[Tuple[str, int]]:
    yield handler.settings_dir, DEPTH_MAX
    yield handler.schemas_dir, DEPTH_MAX
    yield from _of_extensions(handler)
    yield from _of_packages(handler)


def _of_extensions(handler: Any) -> Iterator[Tuple[str, int]]:
    # An installation changes the directory of extensions, or of an organisation's; a new version that of its schemas.
    for directory in handler.labextensions_path:
        yield directory, 2
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(directory)):
                yield os.path.join(directory, name, "schemas"), DEPTH_MAX


def _of_translations(handler: Any) -> Iterator[Tuple[str, int]]:
    yield handler.settings_dir, DEPTH_MAX
    yield from _of_packages(handler)


def _of_kernels(handler: Any) -> Iterator[Tuple[str, int]]:
    for directory in handler.kernel_spec_manager.kernel_dirs:
        yield directory, 2
    yield from _of_packages(handler)
