# SPDX-License-Identifier: BSD-3-Clause
"""Kernels that wait for a person: for input, and at a breakpoint of the debugger."""


def ask(kernel):
    """Runs a cell that waits for input."""
    kernel.send("input('?')", stdin=True)
    kernel.receive("input_request")


def stop(kernel):
    """Runs a cell that the debugger stops."""
    client = {"clientID": "t", "adapterID": "", "pathFormat": "path", "linesStartAt1": True, "columnsStartAt1": True}
    code = "for number in range(1000):\n    number += 1\n"
    assert kernel.debug("initialize", client)["success"]
    kernel.debug("attach", {})
    path = kernel.debug("dumpCell", {"code": code})["body"]["sourcePath"]
    breakpoints = {"source": {"path": path}, "breakpoints": [{"line": 2}], "sourceModified": False}
    assert kernel.debug("setBreakpoints", breakpoints)["success"]
    kernel.debug("configurationDone", {})
    kernel.send(code)
    kernel.receive("debug_event", event="stopped")


def check_waits(agent, notebook):
    """A slot is idle while its kernel waits and its page is closed, and an interrupt frees the kernel."""
    def idle_s():
        return agent.api.get(f"/slots/{notebook.slot}").json()["idle_s"]

    for wait in (ask, stop):
        with notebook.kernel() as kernel:
            wait(kernel)
        path = f"api/kernels/{kernel.id}"
        assert notebook.get(path)["execution_state"] == "busy"
        agent.wait(lambda: idle_s() > 1, "an idle slot")
        notebook.post(path + "/interrupt")
        agent.wait(lambda: notebook.get(path)["execution_state"] == "idle", "an idle kernel")  # noqa: B023
