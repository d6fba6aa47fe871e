# SPDX-License-Identifier: BSD-3-Clause
"""Runs inside an image, as root of a chroot: a zygote that forks the servers of slots.

    python3 forked_slot.py serve SOCKET COUNT [--private-memory] [--quick]
    python3 forked_slot.py suite DIRECTORY

`serve` forks COUNT slots, number n on the socket SOCKET.n with the token "token". `suite` forks one process that runs
jupyter_kernel_test from DIRECTORY instead of a server. Started by forked.py.
"""

import sys

sys.path[0] = "/run/nbagent/lib"

from nbagent.zygote.memory.sharing import PRIVATE_MEMORY_OPTION, QUICK_OPTION, share_memory

# Before the imports below, as in zygote.py.
memory = share_memory(not {PRIVATE_MEMORY_OPTION, QUICK_OPTION} & set(sys.argv))

from nbagent.zygote import as_execd

as_execd.record()

import asyncio
import os
import signal
import socket
import unittest

os.chdir(os.environ["HOME"])
# Before the server is imported, as in notebook_server.py.
sys.modules["rfc3987_syntax"] = None

from jupyterlab.labapp import LabApp
from tornado.httpserver import HTTPServer
from tornado.web import RequestHandler
from traitlets.config import Config

from nbagent.wire.channel import Channel
from nbagent.zygote import entropy, forkserver, kernel, provisioner
from nbagent.zygote.inherited import Openers
from nbagent.zygote.kept_loop import KeptLoop

USER = 1000


class Modules(RequestHandler):
    """Lists the server's imported modules, and whether its singletons, hooks and streams are intact."""

    def get(self):
        self.write({
            "modules": sorted(sys.modules),
            "whole": LabApp._instance is not None and sys.modules["__main__"].__name__ == "__main__"
            and sys.displayhook is sys.__displayhook__ and sys.stdout is sys.__stdout__ and "TERM" not in os.environ,
        })


def initialised():
    config = Config()
    config.IdentityProvider.token = "token"
    config.ServerApp.base_url = "/"
    config.ServerApp.open_browser = False
    config.ServerApp.allow_root = config.ServerApp.allow_remote_access = True
    config.KernelProvisionerFactory.default_provisioner_name = provisioner.NAME
    server = LabApp.make_serverapp(jpserver_extensions={"jupyterlab": True}, config=config)
    server.write_server_info_file = server.write_browser_open_files = lambda: None
    server.initialize([], starter_extension="lab", new_httpserver=False)
    server.web_app.add_handlers(".*", [("/modules", Modules)])
    return server


def serve(server, loop, path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen()
    listener.setblocking(False)
    become_user()
    entropy.reseed()
    provisioner.use(split_off_server())
    loop.restore()
    server._http_server = HTTPServer(server.web_app)
    server._http_server.add_socket(listener)
    server.start()


def split_off_server():
    """Splits this process into a fork server and a server; returns in the server. The init is a closed channel."""
    init, peer = Channel.pair()
    return forkserver.split_off_server(kernel.run, init, peer.close)


def become_user():
    os.setsid()
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    # A shell starts a command in the background with these ignored, and a kernel that is started by exec inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def suite(directory):
    become_user()
    provisioner.use(split_off_server())
    LabApp.clear_instance()
    asyncio.set_event_loop(asyncio.new_event_loop())
    os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = provisioner.NAME
    sys.path.append(directory)
    import jupyter_kernel_test

    class ForkedKernel(jupyter_kernel_test.KernelTests):
        kernel_name = "python3"
        language_name = "python"
        file_extension = ".py"
        code_hello_world = "print('hello, world')"
        code_stderr = "import sys; print('test', file=sys.stderr)"
        completion_samples = [{"text": "zi", "matches": {"zip"}}]
        complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n"]
        incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]
        invalid_code_samples = ["import = 7q"]
        code_page_something = "zip?"
        code_generate_error = "raise"
        code_execute_result = [{"code": "6*7", "result": "42"}]
        code_display_data = [{"code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))",
                              "mime": "text/html"}]
        code_inspect_sample = "zip"
        code_clear_output = "from IPython.display import clear_output; clear_output()"
        code_history_pattern = "1?2*"
        supported_history_operations = ()

        def test_it_is_a_fork(self):
            self.assertIsInstance(self.km.provisioner.process, forkserver.ForkedProcess)

    found = unittest.defaultTestLoader.loadTestsFromTestCase(ForkedKernel)
    result = unittest.TextTestRunner(verbosity=2).run(found)
    sys.stderr.flush()
    os._exit(not result.wasSuccessful())


def main():
    mode, where = sys.argv[1:3]
    provisioner.register()
    server = initialised()
    kernel.prepare(server, memory, (), Openers(), quick=QUICK_OPTION in sys.argv)
    loop = KeptLoop(server.io_loop.asyncio_loop)
    loop.release()
    memory.freeze()
    # The files in a slot's home belong to the slot's user.
    for directory, _folders, files in os.walk(os.environ["HOME"]):
        for name in (directory, *(os.path.join(directory, file) for file in files)):
            os.lchown(name, USER, USER)
    pids = []
    for number in range(int(sys.argv[3]) if mode == "serve" else 1):
        pid = os.fork()
        if pid == 0:
            if mode == "serve":
                serve(server, loop, f"{where}.{number}")
            else:
                suite(where)
            os._exit(0)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    # Python's finalisation has to work with immortal objects too, so that a zygote exits without an error.
    sys.exit(max(statuses))


if __name__ == "__main__":
    main()
