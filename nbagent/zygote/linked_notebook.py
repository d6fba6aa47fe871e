# SPDX-License-Identifier: BSD-3-Clause
"""The kernel of the notebook in a link starts when its page is requested.

JupyterLab requests it at the end of a chain of requests, each of which waits for the browser to run the program. Here
the server makes, with the response to the page's own request, what JupyterLab will request: the session of the notebook
and its first checkpoint. JupyterLab finds both, and connects to the session.

Nothing is started where JupyterLab would show a dialog or no notebook: for a notebook that names no kernel, or one that
the image does not have, and for a text editor in place of the notebook. If something fails, JupyterLab's own request
fails too, and it shows why.

Runs inside an image, under the image's own Python; 3.9 and up.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import os
from contextlib import suppress
from typing import Any, Callable, Dict, Optional

from jupyter_server.utils import ensure_async

# A larger notebook is read only when the page requests it, because the server would read it twice.
NOTEBOOK_MAX_BYTES = 4 << 20
# Handlers of pages whose last path argument is the notebook's: of JupyterLab's window, and of Notebook 7.
_PAGES = (("jupyterlab_server.handlers", "LabHandler"), ("notebook.app", "NotebookHandler"))


def install(server: Any) -> None:
    """Lets the pages of applications start sessions; for the whole process, and to be called once."""
    starts = Starts(server)
    for module, name in _PAGES:
        with suppress(ImportError, AttributeError):
            handler = getattr(importlib.import_module(module), name)
            handler.get = starts.after(handler.get)


class Starts:
    """The sessions that are being started, by the notebook's path."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._tasks: Dict[str, asyncio.Task[None]] = {}
        sessions = server.session_manager
        self._exists = sessions.session_exists
        sessions.session_exists = self._exists_when_started

    async def _exists_when_started(self, path: str) -> Any:
        """As the session manager's; a request for a session that is being started gets that one."""
        if task := self._tasks.get(path):
            await asyncio.wait([task])
        return await ensure_async(self._exists(path))

    def after(self, get: Callable[..., Any]) -> Callable[..., Any]:
        """A page's handler that starts the session after its response."""

        @functools.wraps(get)
        def respond(handler: Any, *arguments: Any, **named: Any) -> Any:
            result = get(handler, *arguments, **named)
            path = str((*arguments, *named.values())[-1] or "") if arguments or named else ""
            factory = handler.get_query_argument("factory", "Notebook")
            # An unauthorised request is redirected.
            if handler.get_status() == 200 and path.endswith(".ipynb") and factory == "Notebook":
                self._begin(path.removeprefix("/tree/"))
            return result

        return respond

    def _begin(self, path: str) -> None:
        path = path.strip("/")
        if path not in self._tasks:
            task = self._tasks[path] = asyncio.ensure_future(self._start(path))
            task.add_done_callback(lambda _done: self._tasks.pop(path))

    async def _start(self, path: str) -> None:
        # JupyterLab makes the same requests, and shows what is wrong.
        with suppress(Exception):
            sessions, contents = self._server.session_manager, self._server.contents_manager
            name = kernel_name(os.path.join(contents.root_dir, *path.split("/")))
            if name not in await ensure_async(self._server.kernel_spec_manager.get_all_specs()):
                return
            if not await ensure_async(self._exists(path)):
                await ensure_async(sessions.create_session(
                    path=path, name=path.rpartition("/")[2], type="notebook", kernel_name=name))
            if not await ensure_async(contents.list_checkpoints(path)):
                await ensure_async(contents.create_checkpoint(path))


def kernel_name(file_path: str) -> Optional[str]:
    """The kernel that a notebook's file names. Raises OSError, ValueError, AttributeError for what is no notebook."""
    if os.path.getsize(file_path) > NOTEBOOK_MAX_BYTES:
        return None
    with open(file_path, encoding="utf-8") as file:
        found: Optional[str] = json.load(file).get("metadata", {}).get("kernelspec", {}).get("name")
    return found
