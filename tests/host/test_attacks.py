"""Attacks on what a host has of everything: each ends in the slot that makes it, and its neighbours hardly notice."""

import json

# What the kernel counts for each user and has a ceiling for, taken until it is refused: locked memory (8 MiB),
# message queues (800 KiB), pending signals, which timers are counted among.
TAKE = """
import ctypes, json, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
def locked_mib():
    taken = 0
    while taken < 64:
        held.append(mmap.mmap(-1, 1 << 20))
        address = ctypes.addressof(ctypes.c_char.from_buffer(held[-1]))
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(1 << 20)):
            break
        taken += 1
    return taken
def queues():
    taken = 0
    while taken < 64 and libc.mq_open(b"/%d" % taken, os.O_CREAT | os.O_RDWR, 0o600, None) >= 0:
        taken += 1
    return taken
def timers():
    taken, timer = 0, ctypes.c_void_p()
    while taken < 1 << 20 and not libc.timer_create(1, None, ctypes.byref(timer)):
        taken += 1
    return taken
held = []
print(json.dumps([locked_mib(), queues(), timers()]))
"""
NS_GET_OWNER_UID = 0xB704


def test_what_the_kernel_counts_for_each_user_it_counts_for_each_slot(agent):
    # Each has a kernel, so that what the first took is held while the second takes the same.
    agent.wait_warm()
    with agent.open().kernel() as first, agent.open().kernel() as second:
        took = [json.loads(kernel.run(TAKE).stream) for kernel in (first, second)]
        assert took[0] == took[1]
        locked, queues, timers = took[0]
        assert 1 <= locked <= 8 and 1 <= queues < 64 and 1000 < timers <= 4096
        known = json.loads(agent.run("cat", f"/run/nbagent/slots/{first.notebook.slot}/slot.json"))
        owner = agent.run("python3", "-c", f"""
import fcntl, struct
with open("/proc/{known['pid']}/ns/user") as namespace:
    print(*struct.unpack("I", fcntl.ioctl(namespace, {NS_GET_OWNER_UID}, bytes(4))))
""")
        assert int(owner) == known["id_base"] + known["uid"]
        # Root on the host has lost nothing by it, nor has it to count theirs.
        assert agent.run("timeout", "5", "true") == ""
