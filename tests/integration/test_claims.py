# SPDX-License-Identifier: BSD-3-Clause
"""A claim returns a working notebook, by HTTP through the router."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest


def test_curl_gets_a_complete_claim_document(agent):
    claim = json.loads(agent.run("curl", "-sS", "127.0.0.1:9000/claim"))
    assert set(claim) == {"slot", "url", "path", "token", "image", "claimed_at", "expires_at", "network", "limits"}
    assert claim["network"] == "none"
    assert claim["url"] == f"http://127.0.0.1:8000/user/{claim['slot']}/lab?token={claim['token']}"
    assert claim["image"] == "minimal"


def test_a_claimed_notebook_runs_a_cell_through_the_router(agent):
    result = agent.open().run("6 * 7")
    assert (result.status, result.text) == ("ok", "42")


def test_the_page_opens_with_the_token_and_not_without(agent):
    claim = agent.claim()
    page = agent.router.get(claim["path"] + "?token=" + claim["token"])
    assert page.status == 200 and b"jupyter-config-data" in page.body
    assert agent.router.get(claim["path"]).status == 302
    assert agent.router.get(f"/user/{claim['slot']}/api/contents").status == 403
    assert agent.router.get(f"/user/{claim['slot']}/api/contents?token=wrong").status == 403


def test_the_token_of_one_slot_does_not_open_another(agent):
    mine, other = agent.claim(), agent.claim()
    answer = agent.router.get(f"/user/{other['slot']}/api/contents", Authorization=f"token {mine['token']}")
    assert answer.status == 403


def test_concurrent_claims_get_different_slots(agent):
    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(lambda _: agent.claim(), range(6)))
    assert len({claim["slot"] for claim in claims}) == 6
    assert len({claim["token"] for claim in claims}) == 6


def test_a_claim_on_an_empty_pool_waits_for_a_start(agent):
    agent.configure("[pool]\nwarm = 0\n")
    agent.wait(lambda: not agent.slots("warm"), "an empty pool")
    assert agent.open().run("1 + 1").text == "2"


def test_the_same_idempotency_key_gives_the_same_slot(agent):
    headers = {"Idempotency-Key": "one-click"}
    first = agent.api.call("POST", "/claim", {"ttl": 600}, headers)
    again = agent.api.call("POST", "/claim", {"ttl": 600}, headers)
    assert first.status == again.status == 200
    assert first.json() == again.json()
    other = agent.api.call("POST", "/claim", {"ttl": 601}, headers)
    assert other.status == 422 and other.json()["type"] == "urn:nbagent:problem:idempotency-mismatch"


def test_a_key_outlives_the_supervisor(agent):
    headers = {"Idempotency-Key": "before-and-after"}
    first = agent.api.call("POST", "/claim", None, headers).json()
    agent.run("systemctl", "restart", "nbagent.service")
    assert agent.api.call("POST", "/claim", None, headers).json() == first


def test_options_of_a_claim_are_those_of_its_scope(agent):
    claim = agent.claim(memory="300M", cpu_weight=50, cpu_quota="1/4", ttl="10min", path="lab/tree/Welcome.ipynb")
    assert claim["url"].split("?")[0].endswith(f"/user/{claim['slot']}/lab/tree/Welcome.ipynb")
    shown = agent.run("systemctl", "show", f"nbagent-{claim['slot']}.scope").splitlines()
    cpus = int(agent.run("nproc"))
    for line in (f"MemoryMax={300 << 20}", "CPUWeight=50", "Slice=nbagent-slots.slice", "MemorySwapMax=0"):
        assert line in shown
    assert any(line.startswith("CPUQuotaPerSecUSec=") and line.endswith(f"={cpus * 250}ms") for line in shown)


def test_a_deep_link_opens_that_notebook(agent):
    claim = agent.claim(path="lab/tree/Welcome.ipynb")
    assert agent.router.get(claim["path"] + "?token=" + claim["token"]).status == 200


def test_a_released_slot_is_unknown_to_the_api_and_the_router(agent):
    claim = agent.claim()
    pids = agent.processes(claim["slot"])
    assert pids
    assert agent.api.delete(f"/slots/{claim['slot']}").json()["state"] == "stopping"
    agent.wait(lambda: agent.api.get(f"/slots/{claim['slot']}").status == 404, "the removal of the slot")
    page = agent.router.get(claim["path"], Accept="text/html")
    assert page.status == 404 and b"no longer running" in page.body
    assert agent.run("sh", "-c", f"ls -d {' '.join(f'/proc/{pid}' for pid in pids)} 2>/dev/null; true") == ""
    assert agent.api.delete(f"/slots/{claim['slot']}").status == 404


def test_a_running_slot_gets_more_time_and_other_limits(agent):
    claim = agent.claim(ttl=60)
    changed = agent.api.patch(f"/slots/{claim['slot']}", {"ttl": 3600, "memory": "400M", "cpu_weight": 200})
    assert changed.status == 200
    assert changed.json()["limits"]["memory_bytes"] == 400 << 20
    assert changed.json()["expires_at"] > claim["expires_at"]
    shown = agent.run("systemctl", "show", f"nbagent-{claim['slot']}.scope").splitlines()
    assert f"MemoryMax={400 << 20}" in shown and "CPUWeight=200" in shown
    refused = agent.api.patch(f"/slots/{claim['slot']}", {"image": "minimal"})
    assert refused.status == 400 and refused.json()["field"] == "image"


# The facts that libraries read of a slot's limits, in a kernel and in a program that it starts.
SEEN = """
import json, os, subprocess, sys
names = ("OMP_NUM_THREADS", "PYTHON_CPU_COUNT", "OMP_WAIT_POLICY", "MEM_LIMIT", "CPU_LIMIT")
program = [sys.executable, "-c", "import os; print(os.cpu_count())"]
with open("/proc/meminfo") as file:
    total_kb = int(file.readline().split()[1])
print(json.dumps([*(os.environ.get(name) for name in names), os.cpu_count(),
                  int(subprocess.run(program, stdout=subprocess.PIPE, check=True).stdout),
                  os.sysconf("SC_NPROCESSORS_ONLN"), total_kb >> 10]))
"""
SYSTEM = """
import json, os, re, subprocess
cores = subprocess.run(["lscpu", "--all", "--parse=core"], stdout=subprocess.PIPE, check=True, text=True).stdout
shown = ("/sys/fs/cgroup/cgroup.procs", "/proc/meminfo", "/sys/devices/system/cpu/online")
print(json.dumps([len(re.findall(r"^\\d+$", cores, re.M)), len(os.sched_getaffinity(0)),
                  os.path.exists(shown[0]), [path for path in shown if os.access(path, os.W_OK)],
                  sorted(os.listdir("/sys"))]))
"""


@pytest.mark.parametrize("quota", ["50%", "200%"])
def test_libraries_see_the_limits_of_the_claim_and_of_a_change(agent, quota):
    other = {"50%": "200%", "200%": "50%"}[quota]
    seen = {"50%": ["1", "1", "PASSIVE", str(300 << 20), "0.5", 1, 1, 1, 300],
            "200%": ["2", "2", "PASSIVE", str(300 << 20), "2", 2, 2, 2, 300]}
    notebook = agent.open(memory="300M", cpu_quota=quota)
    with notebook.kernel() as kernel:
        assert json.loads(kernel.run(SEEN).stream) == seen[quota]
        cores, affine, has_cgroup, may_write, system = json.loads(kernel.run(SYSTEM).stream)
        assert cores == affine == int(agent.run("nproc")) and has_cgroup and not may_write
        assert system == ["devices", "fs"]
        assert agent.api.patch(f"/slots/{notebook.slot}", {"cpu_quota": other}).status == 200
        notebook.post(f"api/kernels/{kernel.id}/restart")
    assert json.loads(notebook.run(SEEN).stream) == seen[other]
    # Another memory is seen at once, without a restart of the kernel.
    with notebook.kernel() as kernel:
        total = "import os; print(next(open('/proc/meminfo')).split()[1], os.sysconf('SC_NPROCESSORS_ONLN'))"
        changes = {"memory": "400M", "cpu_quota": quota}
        assert agent.api.patch(f"/slots/{notebook.slot}", changes).status == 200
        assert kernel.run(total).stream.split() == [str(400 << 10), str(seen[quota][6])]


@pytest.mark.parametrize(("options", "field"), [
    ({"image": "no-such"}, "image"), ({"memory": "-1"}, "memory"), ({"memory": "1e9G"}, "memory"),
    ({"memory": "lots"}, "memory"), ({"cpu_quota": "100000%"}, "cpu_quota"), ({"ttl": 0}, "ttl"),
    ({"path": "../../etc/passwd"}, "path"), ({"colour": "red"}, "colour"),
])
def test_bad_input_names_the_field_and_costs_no_slot(agent, options, field):
    before = {slot["slot"] for slot in agent.slots("warm")}  # a slot that an earlier test released may end meanwhile
    claimed = {slot["slot"] for slot in agent.slots("claimed")}
    answer = agent.api.post("/claim", options)
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["field"] == field and problem["expected"]
    assert "Traceback" not in answer.body.decode()
    assert {slot["slot"] for slot in agent.slots("warm")} >= before
    assert {slot["slot"] for slot in agent.slots("claimed")} == claimed


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b"[" * 30000, b'{"ttl": NaN}'],
                         ids=["broken", "list", "not-utf8", "deep", "nan"])
def test_a_body_that_is_no_json_object_is_refused(agent, body):
    answer = agent.api.call("POST", "/claim", body, {"Content-Type": "application/json"})
    assert 400 <= answer.status < 500
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_of_ten_megabytes_is_refused(agent):
    answer = agent.run("sh", "-c", "head -c 10485760 /dev/zero | curl -sS -o /dev/null -w '%{http_code}' -X POST "
                       "-H 'Content-Type: application/json' --data-binary @- 127.0.0.1:9000/claim")
    assert answer == "413"


@pytest.mark.parametrize("slot", ["..%2f..%2fetc", "elsewhere-0123456789ab", "x", "%00"])
def test_a_foreign_or_malformed_id_is_not_found(agent, slot):
    for method in ("GET", "PATCH", "DELETE"):
        answer = agent.api.call(method, f"/slots/{slot}", {"ttl": "1h"} if method == "PATCH" else None)
        assert answer.status == 404
        assert answer.headers["content-type"] == "application/problem+json"


def test_only_the_claims_response_has_the_token(agent):
    claim = agent.claim()
    for path in ("/slots", f"/slots/{claim['slot']}", "/stats", "/images", "/metrics"):
        answer = agent.api.get(path)
        assert answer.status == 200
        assert claim["token"] not in answer.body.decode()


def test_draining_refuses_claims_and_keeps_users(agent):
    notebook = agent.open()
    assert agent.api.post("/drain").json()["draining"] is True
    try:
        refused = agent.api.post("/claim")
        assert refused.status == 503 and refused.json()["type"] == "urn:nbagent:problem:draining"
        assert int(refused.headers["retry-after"]) > 0
        assert agent.agent_check() == "drain\n"
        assert agent.api.get("/readyz").status == 503
        assert notebook.run("1").text == "1"
    finally:
        assert agent.api.delete("/drain").json()["draining"] is False
    agent.wait_warm()
    assert agent.agent_check().startswith("ready ")


def test_a_full_host_returns_503_with_retry_after(agent):
    agent.configure("[slots]\ncapacity = 2\n")
    agent.claim()
    agent.claim()
    refused = agent.api.post("/claim")
    assert refused.status == 503 and refused.json()["type"] == "urn:nbagent:problem:full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert agent.agent_check() == "ready 0%\n"
    assert len(agent.slots()) == 2
