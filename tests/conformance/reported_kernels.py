# SPDX-License-Identifier: BSD-3-Clause
"""Public bug reports about kernels and the output of cells. See reports.py."""

from __future__ import annotations

import time
from typing import Any

from acts import cell, kernel_of, put
from reported import reports

from notebook import Kernel, Notebook


@reports("jupyter/jupyter_client#104", "IRkernel/IRkernel#307")
def programs_of_a_kernel_end_with_its_restart(user: Notebook) -> None:
    """Programs that a cell has started outlive the kernel."""
    start = """
        import subprocess
        one = subprocess.Popen(["sleep", "98761"])
        two = subprocess.Popen("sleep 98762 & sleep 98763", shell=True)"""
    count = """
        import glob, time
        def count():
            found = 0
            for name in glob.glob("/proc/[0-9]*/cmdline"):
                try:
                    found += b"sleep\\0009876" in open(name, "rb").read()
                except OSError:
                    pass
            return found
        end = time.monotonic() + 5
        while count() and time.monotonic() < end:
            time.sleep(0.1)
        print(count())"""
    with kernel_of(user) as kernel:
        cell(kernel, start)
        user.post(f"api/kernels/{kernel.id}/restart")
        with Kernel(user, kernel.id) as again:
            assert cell(again, count).strip() == "0"


@reports("ipython/ipykernel#274")
def a_kernel_with_a_pool_of_processes_restarts(user: Notebook) -> Any:
    """A ProcessPoolExecutor that is at work prevents a restart, and the former kernel stays."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import concurrent.futures, multiprocessing, time
            pool = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
            futures = [pool.submit(time.sleep, 1000) for _ in range(4)]""")
        began_s = time.monotonic()
        user.post(f"api/kernels/{kernel.id}/restart")
        with Kernel(user, kernel.id) as again:
            cell(again, "assert 'pool' not in globals()")
        assert time.monotonic() - began_s < 20
    assert len(user.get("api/kernels")) <= 1


@reports("jupyterlab/jupyterlab#12845", "elyra-ai/elyra#2825")
def a_command_prints_random_bytes(user: Notebook) -> None:
    """`!head -c 118000 </dev/urandom` freezes the kernel."""
    with kernel_of(user) as kernel:
        for _ in range(3):
            kernel.run("!head -c 118000 </dev/urandom", 30)
        assert cell(kernel, "print(1 + 1)").strip() == "2"


@reports("jupyterlab/jupyterlab#8769", "parmentelat/nbhosting#160")
def ten_megabytes_of_output_arrive(user: Notebook) -> Any:
    """`IOPub data rate exceeded`, and the page gets no more output."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            for number in range(10000):
                print(f"{number:06}", "x" * 1000)""", 120)
        assert cell(kernel, "print('after')").strip() == "after"
    return "exceeded" in found


@reports("jupyterhub/jupyterhub#4474", "jupyter/notebook#2563", "jupyterhub/jupyterhub#3227")
def a_kernel_of_a_venv_imports_its_packages(user: Notebook) -> Any:
    """A kernelspec of the user's own environment starts another Python, without the environment's packages."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import glob, subprocess, sys
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", "env"], check=True)
            (place,) = glob.glob("env/lib/python*/site-packages")
            open(place + "/only_here.py", "w").write("value = 42")
            install = ["env/bin/python", "-m", "ipykernel", "install", "--user", "--name", "env"]
            subprocess.run(install, check=True)""")
        specs = user.get("api/kernelspecs")["kernelspecs"]
        with kernel_of(user, name="env") as inside:
            found = cell(inside, "import only_here, sys; print(only_here.value, sys.prefix, sys.executable)")
        cell(kernel, """
            import shutil
            shutil.rmtree("env")
            subprocess.run(["jupyter", "kernelspec", "remove", "-f", "env"], check=True)""")
    return [found, sorted(specs)]


@reports("jupyter/docker-stacks#1903")
def a_kernelspecs_script_sets_the_kernels_variables(user: Notebook) -> str:
    """The kernel of another environment has the PATH of the server, because nothing activates its environment."""
    with kernel_of(user) as kernel:
        cell(kernel, r"""
            import json, os, shutil, sys
            place = os.path.expanduser("~/.local/share/jupyter/kernels/script")
            os.makedirs(place)
            with open(place + "/launch.sh", "w") as file:
                file.write(f'export PATH=/opt/own/bin:$PATH\nexec {sys.executable} -m ipykernel_launcher "$@"\n')
            with open(place + "/kernel.json", "w") as file:
                argv = ["sh", place + "/launch.sh", "-f", "{connection_file}"]
                json.dump({"argv": argv, "display_name": "script", "language": "python"}, file)""")
        with kernel_of(user, name="script") as inside:
            first = cell(inside, "import os; print(os.environ['PATH'].split(':')[0])")
        cell(kernel, "shutil.rmtree(place)")
    assert first == "/opt/own/bin\n"
    return first


@reports("jupyter/notebook#2080", "joblib/joblib#513")
def processes_share_work_and_memory(user: Notebook) -> Any:
    """A multiprocessing.Pool hangs, because semaphores are refused or /dev/shm has no room."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import multiprocessing, multiprocessing.shared_memory, operator
            for method in "fork", "spawn", "forkserver":
                with multiprocessing.get_context(method).Pool(3) as pool:
                    assert pool.map(operator.neg, range(100)) == [-n for n in range(100)], method
            block = multiprocessing.shared_memory.SharedMemory(create=True, size=64 << 20)
            block.buf[:] = bytes(64 << 20)
            block.close(), block.unlink()
            manager = multiprocessing.Manager()
            print(dict(manager.dict(a=1)), multiprocessing.get_start_method())
            manager.shutdown()""", 120)


@reports("jupyterhub/jupyterhub#1211", "jupyterlab/jupyterlab#6545", "ipython/ipython#4140")
def output_arrives_after_a_lost_connection(user: Notebook) -> None:
    """The lines that are printed while the connection is lost are lost."""
    with kernel_of(user) as kernel:
        message = kernel.send("import time\nfor n in range(40):\n    print(f'line {n};', flush=True); time.sleep(0.05)")
        kernel.receive("stream")
        kernel.socket.close()
        time.sleep(1)
        again = Kernel(user, kernel.id, kernel.session)
        found = again.result(message).stream
        assert all(f"line {n};" in found for n in range(2, 40)), found
        again.close()


@reports("ipython/ipython#13161", "ipython/ipython#3400", "ipython/ipython#14649")
def an_interrupt_ends_programs_of_a_cell(user: Notebook) -> Any:
    """An interrupt does not end `!` or `%%bash`, and the program goes on."""
    found = []
    with kernel_of(user) as kernel:
        for code in ("!echo begun; sleep 98771", "%%bash\necho begun\nsleep 98772",
                     "import subprocess\nprint('begun', flush=True)\nsubprocess.run(['sleep', '98773'])"):
            message = kernel.send(code)
            kernel.receive("stream")
            time.sleep(0.5)
            user.post(f"api/kernels/{kernel.id}/interrupt")
            found.append(kernel.result(message, 20).status)
        assert cell(kernel, "print(1)").strip() == "1"
        found.append(cell(kernel, """
            import glob, time
            time.sleep(1)
            left = 0
            for name in glob.glob("/proc/[0-9]*/cmdline"):
                try:
                    left += b"sleep\\0009877" in open(name, "rb").read()
                except OSError:
                    pass
            print(left)"""))
    return found


@reports("ipython/ipykernel#110", "jupyter/notebook#3078", "jupyterlab/jupyterlab#7365")
def output_of_libraries_and_programs_is_shown(user: Notebook) -> None:
    """The output of a C library or a child, to descriptors 1 and 2, is not in the cell's output."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            import ctypes, os, subprocess, sys, time
            ctypes.CDLL(None).puts(b"by-puts"), ctypes.CDLL(None).fflush(None)
            os.system("echo by-system")
            os.write(2, b"by-write\\n")
            subprocess.run("echo by-run; echo by-error >&2", shell=True)
            time.sleep(1)""")
    for word in ("by-puts", "by-system", "by-write", "by-run", "by-error"):
        assert word in found, (word, found)


@reports("jupyter/notebook#3106", "spyder-ide/spyder#20629")
def a_cell_forks(user: Notebook) -> None:
    """os.fork() in a cell: the kernel hangs, or the child's output is lost."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            import os, time
            def child(code):
                pid = os.fork()
                if pid == 0:
                    print("in-the-child", flush=True)
                    os._exit(code)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print([child(code) for code in (0, 3)])
            time.sleep(0.5)""")
        assert "[0, 3]" in found, found
        assert cell(kernel, "print('after')").strip() == "after"


@reports("jupyter/notebook#6882", "jupyter/notebook#3860")
def asyncio_works_in_cells(user: Notebook) -> Any:
    """Programs of asyncio.create_subprocess_exec are never reaped, or loops in threads fail."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import asyncio, signal, threading
            one = await asyncio.create_subprocess_exec("sh", "-c", "echo out; exit 3", stdout=asyncio.subprocess.PIPE)
            print(await one.communicate(), one.returncode)
            async def other():
                two = await asyncio.create_subprocess_exec("true")
                return await two.wait()
            results = []
            thread = threading.Thread(target=lambda: results.append(asyncio.run(other())))
            thread.start()
            while thread.is_alive():
                await asyncio.sleep(0.01)
            print(results)
            fired = []
            signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            await asyncio.sleep(0.3)
            print(fired, signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM))""")


@reports("jupyter/notebook#5383", "googlecolab/colabtools#260", "jupyterhub/jupyterhub#2539")
def a_package_that_is_upgraded_is_that_of_the_restarted_kernel(user: Notebook) -> Any:
    """After `pip install` and a restart of the kernel the former version is imported, or none."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import six, zipfile
            info = "six-99.0.dist-info"
            with zipfile.ZipFile("six-99.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("six.py", "answer = 42")
                wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: six\\nVersion: 99.0\\n")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
                wheel.writestr(f"{info}/RECORD", f"six.py,,\\n{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")
            %pip install -q --no-index --no-deps --break-system-packages ./six-99.0-py3-none-any.whl""", 120)
        user.post(f"api/kernels/{kernel.id}/restart")
        with Kernel(user, kernel.id) as again:
            found = cell(again, "import six; print(six.answer)")
            cell(again, "%pip uninstall -q -y --break-system-packages six", 120)
    with kernel_of(user) as kernel:
        return found + cell(kernel, "import six; print(six.__version__ < '9')")


@reports("jupyter/notebook#3468", "jupyter-widgets/ipywidgets#2522", "jupyterhub/the-littlest-jupyterhub#853")
def a_message_of_twenty_megabytes_reaches_the_kernel(user: Notebook) -> None:
    """The connection is closed at a message of more than 10 MiB, such as the file of an upload widget."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            def sized(_comm, message):
                print(len(message["content"]["data"]["file"]))
            get_ipython().kernel.comm_manager.register_target("sized", sized)""")
        opened = {"comm_id": "one", "target_name": "sized", "data": {"file": "x" * 20_000_000}}
        kernel.send_message("comm_open", opened, "shell")
        assert kernel.receive("stream")["content"]["text"].strip() == "20000000"


@reports("ipython/ipython#12513", "jupyterlab/jupyterlab#8914")
def stored_variables_are_in_the_next_kernel(user: Notebook) -> Any:
    """The databases of IPython cannot be written, so that what %store keeps is not in the next kernel."""
    with kernel_of(user) as kernel:
        cell(kernel, "kept_for_later = 'found'\n%store kept_for_later")
    with kernel_of(user) as kernel:
        return cell(kernel, "%store -r kept_for_later\nprint(kept_for_later)\n%store -d kept_for_later")


@reports("jupyter/notebook#4156", "jupyterlab/jupyterlab#10883")
def a_module_that_is_changed_is_reloaded(user: Notebook) -> Any:
    """A module that a cell has written is not found, or a change of it has no effect with %autoreload."""
    with kernel_of(user) as kernel:
        cell(kernel, "%load_ext autoreload\n%autoreload 2")
        cell(kernel, "%%writefile fresh_module.py\ndef value():\n    return 1")
        found = cell(kernel, "import fresh_module; print(fresh_module.value())")
        # The reloader compares times of files in seconds.
        changed = {"type": "file", "format": "text", "content": "def value():\n    return 2"}
        time.sleep(1.1)
        put(user, "fresh_module.py", changed)
        return found + cell(kernel, "print(fresh_module.value()); import os; os.unlink('fresh_module.py')")


@reports("ipython/ipython#10499", "jupyterlab/jupyterlab#14041", "ipython/ipython#514")
def a_program_of_a_cell_that_reads_input_can_be_ended(user: Notebook) -> Any:
    """A program that reads its standard input blocks the cell for ever."""
    with kernel_of(user) as kernel:
        found = cell(kernel, """
            import subprocess
            print(subprocess.run("read line; echo $?", shell=True, capture_output=True, timeout=10).stdout)""")
        # The pseudoterminal of `!` has no input.
        message = kernel.send("!read line")
        time.sleep(1)
        user.post(f"api/kernels/{kernel.id}/interrupt")
        kernel.result(message, 30)
        return found + cell(kernel, "print('goes on')")


@reports("pnpnpn/timeout-decorator#66", "jupyter/notebook#5519")
def a_cell_sets_an_alarm(user: Notebook) -> Any:
    """`signal only works in main thread`."""
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import signal, threading, time
            def late(*_):
                raise TimeoutError("in time")
            print([signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD)])
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                time.sleep(10)
            except TimeoutError as error:
                print(error, threading.current_thread() is threading.main_thread())""")


@reports("jupyter/notebook#1454", "jupyterlab/jupyterlab#744")
def a_kernel_that_does_not_start_can_be_replaced(user: Notebook) -> Any:
    """After the start of a broken kernel the notebook has none, and gets no other."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import json, os
            place = os.path.expanduser("~/.local/share/jupyter/kernels/broken")
            os.makedirs(place, exist_ok=True)
            spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Broken", "language": "python"}
            with open(place + "/kernel.json", "w") as file:
                json.dump(spec, file)""")
        session = {"path": "broken.ipynb", "name": "broken.ipynb", "type": "notebook", "kernel": {"name": "broken"}}
        found = []
        for _ in range(4):
            answer = user.router.call("POST", f"{user.base}api/sessions", session, user.headers)
            assert answer.status == 201, (answer.status, answer.body[:300])
            path = f"{user.base}api/sessions/{answer.json()['id']}"
            answer = user.router.call("PATCH", path, {"kernel": {"name": "python3"}}, user.headers)
            with Kernel(user, answer.json()["kernel"]["id"]) as replaced:
                found.append(cell(replaced, "print(6 * 7)").strip())
            found.append(user.router.call("DELETE", path, headers=user.headers).status)
        cell(kernel, "import shutil; shutil.rmtree(place)")
        return found
