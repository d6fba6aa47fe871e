# SPDX-License-Identifier: BSD-3-Clause
"""Images on a host: imported, several side by side, rolled forward and back; and programs that are not Jupyter."""

import contextlib
import json
import re
import subprocess
import tarfile
import time

import pytest
import websocket

import product
from archives import Archive, Layers
from hostile import NEGATIVE_SPARSE, TARS
from notebook import Notebook
from testhost_driver.errors import CommandFailed

STORE = "/var/lib/nbagent/images"
REGISTRY_PORT = 5000
FETCH_FAILED = r"^nbagent-import-\w+\.service: Failed with result 'exit-code'"
FEW = "[pool]\nwarm = 0\n"

# nginx as a slot's program: it serves below the slot's path, requires the token, and responds with the request's path.
SERVE = r"""
printf '%s\n' "pid /tmp/pid; daemon off; error_log stderr; events {}
http { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f;
uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
server { listen 127.0.0.1:$0; location $1/ {
if (\$arg_key != '$TOKEN') { return 403 refused; } return 200 'I am $ME at \$request_uri'; } } }" > /tmp/nginx.conf
exec nginx -c /tmp/nginx.conf
"""
COMMAND = ["dash", "-c", SERVE, "{port}", "{base_path}"]


def programs(host, *paths):
    """Archive entries of programs of the test host, with their libraries: an image without Python."""
    found = {}
    for path in paths:
        libraries = host.run(["ldd", path]).stdout.splitlines()
        for name in (path, *(line.split()[-2] for line in libraries if "/" in line)):
            found[name.lstrip("/")] = host.run(["cat", name], text=False).stdout
    return found


def base(host):
    """The lowest layer: dash and nginx."""
    archive = Archive()
    for name, content in programs(host, "/bin/dash", "/usr/sbin/nginx").items():
        archive.add(name, content, mode=0o755)
    for name in ("tmp", "proc", "dev", "run", "var/log/nginx"):
        archive.add(name, type=tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
    return archive.bytes()


def served(layer, me, **config):
    """A container image whose program responds with the name `me`."""
    environment = ["PATH=/bin:/usr/sbin", "TOKEN={token}", f"ME={me}"]
    return Layers(**{"Entrypoint": COMMAND, "Env": environment, "ExposedPorts": {"3000/tcp": {}}} | config).layer(layer)


@pytest.fixture(scope="module")
def layout(shared, tmp_path_factory):
    """A layout on the test host with the images `one` and `two`, which differ in their response and in a layer."""
    directory = tmp_path_factory.mktemp("oci") / "layout"
    layer = base(shared.host)
    for tag in ("one", "two"):
        served(layer, tag).layer(Archive().add(f"etc/{tag}", tag.encode())).save(directory, tag).close()
    shared.host.copy_in(str(directory), "/root/")
    yield "/root/layout"
    shared.run("rm", "-rf", "/root/layout")


@pytest.fixture
def images(agent):
    """A function that changes the store; everything but minimal is removed after the test."""
    agent.configure(FEW)
    yield lambda *arguments: change(agent, *arguments)
    known = [image["name"] for image in json.loads(agent.run("nbagent", "image", "list", "--json"))]
    for name in known:
        if name != "minimal":
            agent.run("nbagent", "image", "remove", name)
    for slot in agent.slots():
        agent.release(slot["slot"])
    (kept,) = {image["digest"] for image in json.loads(agent.run("nbagent", "image", "list", "--json"))}
    left = {".lock", "former", "names", kept}
    agent.wait(lambda: set(agent.run("ls", "-A", STORE).split()) == left, "every image but minimal to be deleted")


def change(agent, *arguments):
    """A command that changes the store, and reloads the agent by itself."""
    return json.loads(agent.host.run(["nbagent", "image", *arguments, "--json"], timeout=300).stdout)


def trees(agent):
    return [name for name in agent.run("ls", STORE).split() if name.startswith("sha256-")]


def known(agent):
    """Digests by name, from the agent."""
    return {image["name"]: image["digest"] for image in agent.api.get("/images").json()}


def response_of(agent, claim, key=None):
    """Status and text of the response of `served`'s program at the claim's own address."""
    path = f"{claim['path']}?key={claim['token'] if key is None else key}"
    answer = agent.router.get(path)
    return answer.status, answer.body.decode()


def digest_of(agent, slot):
    return json.loads(agent.run("cat", f"/run/nbagent/slots/{slot}/slot.json"))["digest"]


@contextlib.contextmanager
def serving(agent, layout, *login):
    agent.host.copy_in(str(product.TOP / "tests/registry.py"), "/root/")
    agent.run("systemd-run", "--quiet", "--unit=test-registry", "--property=StandardOutput=truncate:/root/requests",
              "/usr/bin/python3", "/root/registry.py", layout, str(REGISTRY_PORT), *login)
    agent.wait(lambda: not subprocess_fails(agent, "ss", "-Hltn", f"sport = :{REGISTRY_PORT}"), "the registry")
    yield f"docker://127.0.0.1:{REGISTRY_PORT}/team/served"
    agent.run("systemctl", "stop", "test-registry.service")
    agent.run("rm", "/root/registry.py", "/root/requests")


@pytest.fixture
def registry(agent, layout):
    with serving(agent, layout) as found:
        yield found


@pytest.fixture
def private(agent, layout):
    """A registry with a login."""
    with serving(agent, layout, "maria:s3cret") as found:
        yield found


def subprocess_fails(agent, *argv):
    done = agent.host.run(list(argv), check=False)
    return done.returncode != 0 or not done.stdout.strip()


def test_a_container_image_is_imported_from_every_source_and_serves(agent, images, layout, registry):
    agent.run("skopeo", "copy", "--quiet", f"oci:{layout}:one", "docker-archive:/root/one.tar:team/one:1")
    agent.run("chmod", "600", "/root/one.tar")
    try:
        imported = {
            "from_layout": images("import", "--name", "from_layout", f"oci:{layout}:one"),
            "from.archive": images("import", "--name", "from.archive", "docker-archive:/root/one.tar"),
            "from-registry": images("import", "--name", "from-registry", "--insecure", f"{registry}:one"),
        }
    finally:
        agent.run("rm", "/root/one.tar")
    # The digest does not depend on the source, except that docker save compresses the layers again.
    assert imported["from_layout"]["digest"] == imported["from-registry"]["digest"]
    assert imported["from_layout"]["digest"] != imported["from.archive"]["digest"]
    for name, image in imported.items():
        agent.wait(lambda name=name, image=image: known(agent).get(name) == image["digest"], f"{name} to be known")
        claim = agent.claim(image=name)
        assert response_of(agent, claim) == (200, f"I am one at {claim['path']}?key={claim['token']}")
        agent.release(claim["slot"])
    tree = imported["from.archive"]["root"]
    assert agent.run("cat", f"{tree}/etc/one") == "one"
    owners = agent.run("find", tree, "-printf", "%U\n").split()
    assert set(owners) == {str(imported["from.archive"]["id_base"])}


def test_a_failed_fetch_is_reported_and_leaves_no_file(agent, images, layout, registry):
    agent.expect(FETCH_FAILED)
    before = agent.run("find", STORE, "-maxdepth", "2")
    for source, status, message in (
        (f"{registry}:one", 69, "tls"),  # TLS is the default without --insecure
        ("docker://127.0.0.1:1/x:y", 69, "skopeo: .*refused"),
        ("docker-archive:/etc/hostname", 69, "skopeo: "),
        ("docker-archive:/no/such", 69, "No such file"),
        (f"oci:{layout}:three", 65, "tags here: one, two"),
        (f"oci:{layout}", 65, "tags here: one, two"),
        ("ftp://x", 2, "docker-archive:FILE"),
    ):
        done = agent.host.run(["nbagent", "image", "import", "--name", "x", source], check=False, timeout=120)
        assert (done.returncode, bool(re.search(message, done.stderr))) == (status, True), (source, done)
        assert done.stderr.count("\n") == 1
    assert agent.run("find", STORE, "-maxdepth", "2") == before


def attempt(agent, *arguments, before=(), given=""):
    """The exit status and the errors of an import, from a private registry's image `one`."""
    command = [*before, "nbagent", "image", "import", "--name", "secret", "--insecure", *arguments]
    done = agent.host.run(command, check=False, timeout=120, input=given)
    return done.returncode, done.stderr


def test_a_private_registry_takes_a_login_from_a_file_an_option_or_a_credential(agent, images, private):
    agent.expect(FETCH_FAILED)
    source, auth = f"{private}:one", "/etc/nbagent/registry-auth.json"
    status, errors = attempt(agent, source)
    assert (status, "unauthorized" in errors or "authentication required" in errors) == (69, True), errors
    assert attempt(agent, "--user", "maria", source, given="wrong\n")[0] == 69
    assert attempt(agent, "--user", "maria", source, given="s3cret\n")[0] == 0
    agent.run("nbagent", "image", "remove", "secret")
    login = {"auths": {f"127.0.0.1:{REGISTRY_PORT}": {"auth": "bWFyaWE6czNjcmV0"}}, "credsStore": "none"}
    agent.run("sh", "-c", f"umask 077; cat > /root/auth.json; cp /root/auth.json {auth}", input=json.dumps(login))
    try:
        assert attempt(agent, source)[0] == 0
        agent.run("rm", auth)
        assert attempt(agent, source)[0] == 69
        assert attempt(agent, "--auth-file", "/root/auth.json", source)[0] == 0
        credential = "--property=LoadCredential=registry-auth:/root/auth.json"
        service = ("systemd-run", "--quiet", "--wait", "--pipe", credential)
        assert attempt(agent, source, before=service)[0] == 0
    finally:
        agent.run("rm", "-f", auth, "/root/auth.json")
    # No login is left, neither in the store nor in a unit's properties or a command line.
    left = agent.host.run(["grep", "-rl", "bWFyaWE6czNjcmV0", STORE], check=False).stdout
    logged = agent.run("journalctl", "-b", "--no-pager", "-o", "cat", "-u", "nbagent-import-*")
    assert (left, "s3cret" in logged or "bWFyaWE6" in logged) == ("", False)


def test_an_import_uses_the_proxies_of_its_environment_and_the_mirrors_of_the_host(agent, images, registry):
    """Both registries are names without an address: only the proxy and the mirror serve them."""
    proxy = f"http_proxy=http://user:s3cret@127.0.0.1:{REGISTRY_PORT}"
    assert attempt(agent, "docker://far.invalid/team/served:one", before=("env", proxy))[0] == 0
    seen = agent.run("cat", "/root/requests")
    assert "GET http://far.invalid/v2/team/served/manifests/one" in seen
    mirror = "/etc/containers/registries.conf.d/test.conf"
    text = f"""
[[registry]]
location = "mirrored.invalid/team"
[[registry.mirror]]
location = "127.0.0.1:{REGISTRY_PORT}/team"
insecure = true
"""
    agent.run("sh", "-c", f"mkdir -p /etc/containers/registries.conf.d; cat > {mirror}", input=text)
    try:
        assert attempt(agent, "docker://mirrored.invalid/team/served:two")[0] == 0
    finally:
        agent.run("rm", mirror)
    assert agent.run("cat", f"{images('use', 'secret', 'secret')['root']}/etc/two") == "two"
    assert "user:s3cret" not in agent.run("journalctl", "-b", "--no-pager", "-o", "cat")


def checked(agent, name):
    """The exit status of `nbagent image check`, and its results by check."""
    done = agent.host.run(["nbagent", "image", "check", name, "--json"], check=False, timeout=300)
    results = {}
    for result in json.loads(done.stdout):
        # Of several results of a check, the first is about a fault.
        results.setdefault(result["check"], result)
    return done.returncode, results


def test_image_check_tries_a_notebook_image_and_a_command_image(agent, images, layout):
    status, results = checked(agent, "minimal")
    bad = [result for result in results.values() if result["status"] != "ok"]
    assert (status, bad) == (0, []), bad
    assert list(results) == ["launch", "start", "memory at rest", "page", "kernel", "interrupt", "terminal", "files",
                             "handlers"]
    assert results["launch"]["found"] == "fork"
    assert re.match(r"started in [\d,]+ ms, claimed in [\d,]+ ms", results["start"]["found"])
    responded = re.match(r"(\d+) of \1 responded", results["handlers"]["found"])
    assert responded and int(responded[1]) > 5, results["handlers"]
    images("import", "--name", "one", f"oci:{layout}:one")
    agent.wait(lambda: "one" in known(agent), "the image to be known")
    status, results = checked(agent, "one")
    assert (status, list(results)) == (1, ["launch", "start", "memory at rest", "page"])
    # The page of this image is below a key that its claims do not have.
    assert "status 403" in results["page"]["found"]
    assert results["launch"]["found"] == "exec: its program is a command"
    # Another manifest, for the same files.
    environment = {"PATH": "/bin:/usr/sbin", "TOKEN": "{token}", "ME": "one"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in environment.items()]
    head = ['user = "jovyan"', 'home = "/home/jovyan"', f"command = {json.dumps(COMMAND)}", 'url = "?key={token}"']
    agent.host.run(["tee", "/root/one.toml"], input="\n".join([*head, "port = 3000", "[environment]", *lines]))
    other = images("use", "--manifest", "/root/one.toml", "one", "one")
    agent.run("rm", "/root/one.toml")
    agent.wait(lambda: known(agent)["one"] == other["digest"], "the image to be known")
    status, results = checked(agent, "one")
    assert (status, "status 200" in results["page"]["found"]) == (0, True), results
    agent.wait(lambda: not [slot for slot in agent.slots() if slot["state"] == "claimed"], "the slots to be ended")


def test_an_image_in_the_manner_of_docker_stacks_is_forked(agent, images, packages, tmp_path):
    """The image minimal as a lower layer, without its manifest, below what tools and users of containers write."""
    (package,) = (path for path in packages if "image-minimal" in path.name)
    subprocess.run(["dpkg-deb", "-x", str(package), str(tmp_path / "deb")], check=True)
    (minimal,) = (tmp_path / "deb").glob("usr/share/nbagent/images/*.tar.zst")
    mine, link = {"uid": 1000, "gid": 100}, {"type": tarfile.SYMTYPE}
    upper = Archive().add("etc/.wh.nbagent-image.toml").add("dev/console", type=tarfile.CHRTYPE, devmajor=5, devminor=1)
    upper.add("etc/passwd", b"root:x:0:0::/root:/bin/bash\nnb:x:1000:100::/home/nb:/bin/bash\n")
    upper.add("bin/course", b"#!/bin/sh\necho through the link\n", mode=0o755)
    upper.add("usr/local/bin/jupyter-lab", **link, linkname="/opt/course/bin/jupyter-lab")
    # As of a package of conda, whose process in the background may not stay beside the zygote.
    upper.add("usr/etc/conda/activate.d/course.sh",
              b"export COURSE=$((COURSE + 1)) BY=$(id -u) AT=$CONDA_PREFIX\nunset GONE\nsetsid sleep 6543 &\n")
    script = b"#!/bin/sh\n'''exec' \"/usr/bin/python3\" \"$0\" \"$@\"\n' '''\n"
    upper.add("opt/course/bin/jupyter-lab", script, mode=0o755)
    upper.add("srv/private", b"for the user", mode=0o600, **mine).add("home/nb/own", b"at home", mode=0o600, **mine)
    config = {"User": "1000:100", "WorkingDir": "/home/nb", "Entrypoint": ["tini", "-g", "--"], "Cmd": ["start.sh"],
              "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "COURSE=1", "GONE=1"]}
    Layers(**config).layer(minimal.read_bytes(), bytes).layer(upper).save(tmp_path / "layout").close()
    agent.host.copy_in(str(tmp_path / "layout"), "/root/stacks")
    try:
        done = agent.host.run(["nbagent", "image", "import", "--name", "stacks", "oci:/root/stacks"], timeout=300)
    finally:
        agent.run("rm", "-rf", "/root/stacks")
    for part in ("dev/console", "tini -g -- start.sh", "2 files and directories", "/usr/etc/conda/activate.d is run"):
        assert part in done.stderr
    agent.wait(lambda: "stacks" in known(agent), "the image to be known")
    status, results = checked(agent, "stacks")
    assert (status, results["launch"]["found"]) == (0, "fork"), results
    files = "open('/srv/private').read(), open('own').read()"
    variables = "*(os.environ.get(name) for name in ('COURSE', 'BY', 'AT', 'GONE', 'HOME'))"
    cell = f"import os; print({files}, {variables}, os.popen('course').read())"
    output = Notebook(agent.host, agent.claim(image="stacks")).run(cell).stream
    assert output.split() == "for the user at home 2 65533 /usr None /home/nb through the link".split()
    assert agent.run("pgrep", "-fx", "sleep 6543", check=False) == ""


def test_a_hostile_image_is_refused_from_every_source(agent, images, tmp_path):
    """skopeo accepts these images, because it does not read the content of layers."""
    hostile = {
        "out": Archive().add("../../../../etc/cron.d/owned", b"x"),
        "absolute": Archive().add("/etc/cron.d/owned", b"x"),
        "device": Archive().add("sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
        "hard": Archive().add("x", type=tarfile.LNKTYPE, linkname="/etc/shadow"),
        "trap": Archive().add("d", type=tarfile.SYMTYPE, linkname="d").add("d/owned", b"x"),
        "whiteout": Archive().add("d/.wh...", b""),
        "sparse": NEGATIVE_SPARSE, "time": TARS["time-inf"][0], "endless": TARS["sparse-stored-2^60"][0],
    }
    for tag, archive in hostile.items():
        Layers(Cmd=["x"]).layer(archive).save(tmp_path / "hostile", tag).close()
    agent.host.copy_in(str(tmp_path / "hostile"), "/root/")
    before = agent.run("find", STORE, "-maxdepth", "2")
    try:
        for tag in hostile:
            agent.run("skopeo", "copy", "--quiet", f"oci:/root/hostile:{tag}", "docker-archive:/root/hostile.tar:x:y")
            for source in (f"oci:/root/hostile:{tag}", "docker-archive:/root/hostile.tar"):
                done = agent.host.run(["nbagent", "image", "import", "--name", "x", source], check=False, timeout=120)
                assert (done.returncode, done.stderr.count("\n")) == (65, 1), (tag, done)
            agent.run("rm", "/root/hostile.tar")
    finally:
        agent.run("rm", "-rf", "/root/hostile")
    assert agent.run("find", STORE, "-maxdepth", "2") == before
    assert not agent.run("find", "/etc", "/root", "/var/lib/nbagent", "-name", "owned")


def test_skopeo_runs_unprivileged_and_confined(agent, images, layout):
    """A script in place of skopeo prints its ids, its capabilities and the files that it can read and write."""
    agent.expect(FETCH_FAILED)
    spy = """#!/bin/sh
{ id -u; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status
for path in /etc/x /var/lib/nbagent/x /tmp/nbagent-seen; do touch $path 2>/dev/null && echo wrote $path; done
cat /etc/shadow /etc/nbagent/token 2>/dev/null; ls /run/nbagent /root 2>/dev/null
cut -d: -f1 /proc/net/dev | tail -n +3; } > "$HOME/seen" 2>&1
cp "$HOME/seen" "$HOME/copy"; echo; tr '\\n' ';' < "$HOME/seen"; exit 1
"""
    agent.host.run(["tee", "/usr/local/bin/skopeo"], input=spy)
    agent.run("chmod", "755", "/usr/local/bin/skopeo")
    try:
        done = agent.host.run(
            ["nbagent", "image", "import", "--name", "x", "docker-archive:/etc/hostname"], check=False, timeout=60
        )
    finally:
        agent.run("rm", "/usr/local/bin/skopeo")
    assert done.returncode == 69
    uid, capabilities, new_privileges, seccomp, *rest = done.stderr.strip().split("skopeo: ")[1].rstrip(";").split(";")
    assert 0x70000000 <= int(uid) < 0x7FFE0000
    assert int(capabilities.split()[1], 16) == 0
    assert (new_privileges.split()[1], seccomp.split()[1]) == ("1", "2")
    assert [line.strip() for line in rest] == ["wrote /tmp/nbagent-seen", "lo"]
    assert not agent.run("sh", "-c", "ls /tmp/nbagent-seen 2>/dev/null; true")


def test_a_killed_import_leaves_no_image(agent, images, layout):
    # A FIFO without end of file, so that the import is still running when it is killed.
    agent.run("sh", "-c", "mkfifo /root/endless")
    script = "nbagent image add --name killed /root/endless & pid=$!; sleep 1; kill -KILL $pid; wait $pid"
    agent.host.run(["sh", "-c", f"(tail -f /dev/null > /root/endless & echo $! > /root/feeder); {script}"], check=False)
    agent.host.run(["sh", "-c", "kill $(cat /root/feeder); rm /root/feeder /root/endless"])
    agent.host.run(["sh", "-c", f"""
        nbagent image import --name killed oci:{layout}:one & pid=$!
        until ls -d {STORE}/.staging-*/rootfs >/dev/null 2>&1 || ! kill -0 $pid 2>/dev/null; do :; done
        kill -KILL $pid 2>/dev/null; wait $pid"""], check=False)
    left = [name for name in agent.run("ls", "-A", STORE).split() if name.startswith(".staging")]
    if "killed" not in agent.run("ls", f"{STORE}/names").split():
        assert left, "the killed import has left no staging directory"
    images("import", "--name", "whole", f"oci:{layout}:one")
    assert ".staging" not in agent.run("ls", "-A", STORE)


def test_layers_written_by_umoci_are_unpacked_over_each_other(agent, images, layout):
    """Whiteouts, replaced files and configuration, written by another tool."""
    agent.host.run(["sh", "-ec", """
        cp -r /root/layout /root/umoci; cd /root
        umoci unpack --image umoci:one bundle
        rm bundle/rootfs/etc/one; rm -r bundle/rootfs/var/log/nginx; mkdir -p bundle/rootfs/var/log/nginx
        echo changed > bundle/rootfs/etc/new; ln -s new bundle/rootfs/etc/link
        ln bundle/rootfs/etc/new bundle/rootfs/hard
        umoci repack --image umoci:three bundle
        umoci config --image umoci:three --config.env ME=three --config.workingdir /var/log
    """], timeout=120)
    try:
        root = images("import", "--name", "three", "oci:/root/umoci:three")["root"]
    finally:
        agent.run("rm", "-rf", "/root/umoci", "/root/bundle")
    assert agent.run("sh", "-c", f"ls {root}/etc; cat {root}/etc/link {root}/hard") == "link\nnew\nchanged\nchanged\n"
    claim = agent.claim(image="three")
    assert response_of(agent, claim)[1].startswith("I am three at")


def test_several_images_have_a_pool_each_and_serve_side_by_side(agent, images, layout):
    for tag in ("one", "two"):
        images("import", "--name", tag, f"oci:{layout}:{tag}")
    agent.configure("[pool]\nwarm = 1\n[images.two]\nwarm = 2\n")
    pools = agent.wait(
        lambda: (p := agent.api.get("/stats").json()["pools"])
        and [p.get(name, {}).get("warm") for name in ("minimal", "one", "two")] == [1, 1, 2] and p,
        "every pool to be full",
    )
    assert {name: pools[name]["wanted"] for name in ("minimal", "one", "two")} == {"minimal": 1, "one": 1, "two": 2}
    claims = {name: agent.claim(image=name) for name in ("one", "two", "minimal")}
    assert [response_of(agent, claims[name])[1].split(" at ")[0] for name in ("one", "two")] == ["I am one", "I am two"]
    assert Notebook(agent.host, claims["minimal"]).run("6 * 7").text == "42"
    uids = [agent.run("stat", "-c", "%u", f"/proc/{agent.processes(claim['slot'])[0]}").strip()
            for claim in claims.values()]
    assert len({int(uid) >> 16 for uid in uids}) == 3, "each image has its own range of ids"


def test_a_name_is_rolled_forward_and_back_while_claimed_slots_keep_their_image(agent, images, layout):
    old = images("import", "--name", "app", f"oci:{layout}:one")
    agent.configure(FEW + "[images.app]\nwarm = 1\n")
    agent.wait(lambda: agent.slots("warm"), "a warm slot")
    user = agent.claim(image="app")
    new = images("import", "--name", "app", f"oci:{layout}:two")
    assert new["former"] == old["digest"]

    def rolled(image):
        warm = [slot["slot"] for slot in agent.slots("warm")]
        with contextlib.suppress(CommandFailed):
            return warm and {digest_of(agent, slot) for slot in warm} == {image["digest"]}
        return False

    agent.wait(lambda: rolled(new), "warm slots of the new image only")
    assert response_of(agent, agent.claim(image="app"))[1].startswith("I am two")
    assert response_of(agent, user)[1].startswith("I am one")
    back = images("use", "app", old["digest"].removeprefix("sha256-")[:12])
    assert (back["digest"], back["former"]) == (old["digest"], new["digest"])
    agent.wait(lambda: rolled(old), "warm slots of the old image again")
    # A tree that is neither the image nor the previous image of a name is deleted with its last slot, and not before.
    two = next(slot["slot"] for slot in agent.slots("claimed") if digest_of(agent, slot["slot"]) == new["digest"])
    images("use", "app", "minimal")
    images("use", "app", old["digest"])
    agent.wait(lambda: known(agent)["app"] == old["digest"], "the agent to reload its store")
    assert new["digest"] in trees(agent)
    agent.release(two)
    agent.wait(lambda: new["digest"] not in trees(agent), "the tree of the new image to be deleted")
    assert response_of(agent, user)[1].startswith("I am one")


def test_a_change_of_the_store_deletes_no_tree_of_a_starting_slot(agent, images, layout):
    images("import", "--name", "app", f"oci:{layout}:one")
    agent.configure(FEW + "[images.app]\nwarm = 2\n")
    for turn in range(6):
        tag = ("two", "one")[turn % 2]
        # The name is removed for a moment, so that only the starting slots keep the tree, while claims are made.
        agent.host.run(["sh", "-ec", f"""
            for n in 1 2 3; do curl -s -o /dev/null -X POST '127.0.0.1:9000/claim?image=app&ttl=2s' & done
            nbagent image remove app; nbagent image import --name app oci:{layout}:{tag}; wait"""], timeout=120)
    agent.wait(lambda: "app" in known(agent), "the agent to know app")
    assert response_of(agent, agent.claim(image="app"))[0] == 200
    # A failed start logs a warning, which check_journal() does not accept.
    agent.check_journal()


def test_a_slot_of_a_program_is_confined_like_one_of_a_notebook(agent, images, layout):
    images("import", "--name", "app", f"oci:{layout}:one")
    claim = agent.claim(image="app")
    assert response_of(agent, claim, "wrong")[0] == 403
    pids = agent.processes(claim["slot"])
    assert len(pids) >= 4  # init, the forwarder, nginx and its worker
    owners = set()
    for pid in pids:
        status = agent.run("cat", f"/proc/{pid}/status")
        facts = dict(re.findall(r"^(\w+):\s+(\S+)", status, re.MULTILINE))
        assert (int(facts["CapEff"], 16), int(facts["CapBnd"], 16)) == (0, 0), status
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2"), status
        owners.add(facts["Uid"])
        command = agent.run("cat", f"/proc/{pid}/cmdline")
        assert claim["token"] not in command
        descriptors = agent.run("sh", "-c", f"readlink /proc/{pid}/fd/*")
        if command.startswith("nginx"):
            assert "nbagent-activity" not in descriptors
    assert len(owners) == 1
    assert int(owners.pop()) > 0x70000000 + 2000


def test_a_request_of_a_client_is_activity_of_a_program(agent, images, layout):
    images("import", "--name", "app", f"oci:{layout}:one")
    claim = agent.claim(image="app")

    def idle_s():
        return agent.api.get(f"/slots/{claim['slot']}").json()["idle_s"]

    agent.wait(lambda: idle_s() > 1, "it to be idle")
    requested_s = time.monotonic()
    response_of(agent, claim)
    assert idle_s() <= time.monotonic() - requested_s + 0.1
    agent.configure(FEW + '[cull]\nidle = "2s"\ncpu = 1.0\n')
    # Requests that the program refuses are no activity.
    statuses = set()
    agent.wait(lambda: statuses.add(response_of(agent, claim, "wrong")[0]) or 404 in statuses, "it to be culled")
    assert statuses - {502} == {403, 404}


def test_a_program_that_ends_or_does_not_listen_is_reported(agent, images, layout, tmp_path):
    agent.expect(r"slot \S+ did not start: (the slot's program ended|not ready after 2 s|exec: )")
    agent.expect(r"pool (deaf|gone) pauses ")
    agent.expect(r"^nbagent-\S+\.scope: Failed with result")
    layer = base(agent.host)
    # On a loaded machine either the forwarder or the supervisor is the first to notice that the time is up.
    cases = {"deaf": (["dash", "-c", "kill -STOP $$"], "did not listen on 127.0.0.1:3000 in time|not ready after 2 s"),
             "gone": (["no-such-program"], "No such file or directory")}
    for tag, (command, _) in cases.items():
        served(layer, tag, Entrypoint=command).save(tmp_path / "bad", tag).close()
    agent.host.copy_in(str(tmp_path / "bad"), "/root/")
    agent.configure('[slots]\nstart_timeout = "2s"\n[pool]\nwarm = 0\nclaim_timeout = "8s"\nbackoff = "30s"\n')
    try:
        for tag, (_, message) in cases.items():
            images("import", "--name", tag, f"oci:/root/bad:{tag}")
            agent.wait(lambda tag=tag: tag in known(agent), f"{tag} to be known")
            refused = agent.api.post("/claim", {"image": tag})
            assert refused.status == 503, refused.body
            failed = [entry["MESSAGE"] for entry in agent.journal("-t", "nbagent", "-p", "warning")]
            slot = re.findall(r"slot (\S+) did not start", "\n".join(failed))[-1]
            output = agent.run("journalctl", "--no-pager", "-o", "cat", f"NBAGENT_SLOT={slot}")
            output += agent.run("journalctl", "--no-pager", "-o", "cat", "-u", f"nbagent-{slot}.scope")
            assert re.search(message, output), output
    finally:
        agent.run("rm", "-rf", "/root/bad")


def test_a_container_image_with_jupyterlab_needs_no_manifest(agent, images, tmp_path):
    """As FROM python:3, WORKDIR /app, COPY . ., and a command that names an environment outside of the PATH."""
    image = Layers(WorkingDir="/app", Env=["PATH=/usr/bin:/bin"], Cmd=["/usr/local/bin/jupyter", "lab", "--allow-root"])
    image.layer(agent.host.run(["cat", "/usr/share/nbagent/images/minimal.tar.zst"], text=False).stdout, bytes)
    empty = b'{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    image.layer(Archive().add("etc/.wh.nbagent-image.toml").add("app", type=tarfile.DIRTYPE, mode=0o700)
                .add("app/More.ipynb", empty, mode=0o600))
    image.save(tmp_path / "docker").close()
    agent.host.copy_in(str(tmp_path / "docker"), "/root/")
    try:
        added = images("import", "--name", "docker", "oci:/root/docker")
    finally:
        agent.run("rm", "-rf", "/root/docker")
    assert any("/usr/local/bin/jupyter lab" in note for note in added["notes"])
    notebook = agent.open(image="docker")
    assert notebook.run("import os; os.getcwd(), open('More.ipynb', 'a').close(), os.mkdir('made')").text == (
        "('/app', None, None)")
    found = notebook.get("api/contents")["content"]
    assert sorted((item["name"], item["writable"]) for item in found) == [("More.ipynb", True), ("made", True)]
    changed = {"type": "notebook", "content": json.loads(empty)}
    saved = notebook.router.call("PUT", f"{notebook.base}api/contents/More.ipynb", changed, notebook.headers)
    assert saved.status == 200, saved
    # Another slot has the image's.
    other = agent.open(image="docker")
    assert [item["name"] for item in other.get("api/contents")["content"]] == ["More.ipynb"]


def test_a_manifest_can_be_given_at_the_import(agent, images, layout):
    words = ", ".join(json.dumps(word.replace("{port}", "4000")) for word in COMMAND)
    text = (f'command = [{words}]\nport = 4000\nready = "x"\nurl = "start?key={{token}}"\nuser = "maria"\n'
            'home = "/home/maria"\n[environment]\nPATH = "/bin:/usr/sbin"\nTOKEN = "{token}"\nME = "given"\n')
    agent.host.run(["tee", "/root/manifest.toml"], input=text)
    try:
        images("import", "--name", "given", "--manifest", "/root/manifest.toml", f"oci:{layout}:one")
    finally:
        agent.run("rm", "/root/manifest.toml")
    claim = agent.claim(image="given")
    assert claim["url"].endswith(f"/user/{claim['slot']}/start?key={claim['token']}")
    answer = agent.router.get(claim["url"].split(":8000")[1])
    assert answer.body.decode().startswith(f"I am given at /user/{claim['slot']}/start")


def test_a_layer_changes_files_of_an_image_in_place_of_a_new_build(agent, images, tmp_path):
    layer = Archive().add("home/jovyan/data/one.csv", b"a,b\n", mode=0o644).add("home/jovyan/.wh.Welcome.ipynb")
    agent.host.copy_in(str(layer.add("etc/issue", b"changed\n").save(tmp_path / "layer.tar")), "/root/")
    agent.host.run(["tee", "/root/damaged.tar"], input="no archive")
    minimal = json.loads(agent.run("nbagent", "image", "list", "--json"))[0]
    try:
        listed = agent.run("nbagent", "image", "list", "--json")
        command = ["nbagent", "image", "use", "--layer", "/root/damaged.tar", "course", "minimal"]
        refused = agent.host.run(command, check=False)
        assert refused.returncode == 65 and "Traceback" not in refused.stderr, refused
        assert agent.run("nbagent", "image", "list", "--json") == listed
        began_s = time.monotonic()
        changed = images("use", "--layer", "/root/layer.tar", "course", "minimal")
        assert time.monotonic() - began_s < 60  # an import of the image takes minutes on a busy machine
        assert images("use", "--layer", "/root/layer.tar", "course", "minimal")["digest"] == changed["digest"]
    finally:
        agent.run("rm", "/root/layer.tar", "/root/damaged.tar")
    assert changed["digest"] != minimal["digest"] and changed["launch"] == minimal["launch"]
    # The trees share the files that are in both, and the layer was not written into those of the image.
    inodes = [agent.run("stat", "-c", "%i", f"{one['root']}/usr/lib/os-release") for one in (minimal, changed)]
    assert inodes[0] == inodes[1]
    assert "changed" not in agent.run("cat", f"{minimal['root']}/etc/issue")
    with_layer, without = (Notebook(agent.host, agent.claim(image=image)) for image in ("course", "minimal"))
    assert with_layer.get("api/contents/data/one.csv")["content"] == "a,b\n"
    assert with_layer.run("print(open('/etc/issue').read(), end='')", 120).stream == "changed\n"
    assert "Welcome.ipynb" not in [item["name"] for item in with_layer.get("api/contents")["content"]]
    assert "Welcome.ipynb" in [item["name"] for item in without.get("api/contents")["content"]]
    # Switched back by one command, for slots that start from then on.
    assert images("use", "course", "minimal")["digest"] == minimal["digest"]
    assert with_layer.get("api/contents/data/one.csv")["content"] == "a,b\n"


KEY_OF = """
import pathlib, sys
from nbagent.imagebuild.recipe import read_recipe
print(read_recipe(pathlib.Path(sys.argv[1])).key())
"""


def test_a_recipe_is_built_and_stored_by_one_command(agent, images):
    """The test host is offline, so the archive is copied into its build cache first."""
    built = subprocess.run([product.TOP / "images/build", product.TOP / "images/minimal"],
                           stdout=subprocess.PIPE, text=True, check=True).stdout.split()[1]
    agent.host.copy_in(str(product.TOP / "images/minimal"), "/root/")
    key = agent.run("/usr/bin/python3", "-BIc", KEY_OF, "/root/minimal").strip()
    agent.run("mkdir", "-p", f"/var/cache/nbagent/images/{key}")
    agent.host.copy_in(built, f"/var/cache/nbagent/images/{key}/")
    try:
        added = images("build", "--name", "again", "/root/minimal")
    finally:
        agent.run("rm", "-rf", "/root/minimal", "/var/cache/nbagent")
    assert added["digest"] == known(agent)["minimal"]


@pytest.fixture
def marimo(agent, images):
    """The image of images/marimo, built once on the machine of the tests."""
    done = subprocess.run([product.TOP / "images/build", product.TOP / "images/marimo"],
                          stdout=subprocess.PIPE, text=True, check=True)
    agent.host.copy_in(done.stdout.split()[1], "/root/marimo.tar.zst")
    images("add", "--name", "marimo", "/root/marimo.tar.zst")
    agent.run("rm", "/root/marimo.tar.zst")
    # The router forwards only cookies from its settings, and marimo stores its login in one of its own.
    agent.configure(FEW + '[router]\ncookies = ["session_2718_user_*"]\n')
    agent.run("systemctl", "reload", "nbagent-router.service")
    yield
    agent.configure(FEW)
    agent.run("systemctl", "reload", "nbagent-router.service")


def test_marimo_opens_by_the_claims_link_and_its_websocket_works(agent, marimo):
    claim = agent.claim(image="marimo")
    base_path = f"/user/{claim['slot']}/"
    assert claim["url"] == f"http://127.0.0.1:8000{base_path}?access_token={claim['token']}"
    assert agent.router.get(base_path).status in (303, 401, 403)
    opened = agent.router.get(f"{base_path}?access_token={claim['token']}")
    assert opened.status == 303, opened
    cookie = opened.headers["set-cookie"].split(";")[0]
    agent.wait(lambda: agent.router.get(base_path, Cookie=cookie).status == 200, "the router's settings")
    page = agent.router.get(base_path, Cookie=cookie)
    assert b"marimo" in page.body
    script = re.search(rb'src="\./(assets/[^"]+\.js)"', page.body)
    assert agent.router.get(base_path + script[1].decode(), Cookie=cookie).status == 200
    connection = websocket.create_connection(
        f"ws://127.0.0.1:8000{base_path}ws?session_id=s_test01&file=__new__test01",
        socket=agent.host.connect(product.ROUTER_PORT), cookie=cookie, timeout=60,
    )
    with contextlib.closing(connection):
        assert json.loads(connection.recv())["op"] == "kernel-ready"
