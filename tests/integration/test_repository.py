# SPDX-License-Identifier: BSD-3-Clause
"""The apt repository of `make repo`: a host installs nbagent from it, and refuses what its key has not signed."""

import json
import os
import re
import subprocess
import time

import pytest

import product
from testhost_driver import Host

URL = "http://127.0.0.1:8088"
SOURCES = "/etc/apt/sources.list.d/nbagent.sources"


def gpg(home, *arguments):
    command = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", "", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A directory of gpg with one key for each user id that a test needs."""
    home = tmp_path_factory.mktemp("gpg")
    for name in ("site", "other"):
        gpg(home, "--quick-generate-key", name, "ed25519", "sign", "1y")
    yield home
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)


def build(keys, name, out, packages):
    environment = os.environ | {"GNUPGHOME": str(keys), "NBAGENT_REPO_KEY": name}
    command = [product.TOP / "packaging/build-repo", str(out), URL, *map(str, packages)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def repository(keys, packages, tmp_path_factory):
    """A repository that is signed by the key "site"."""
    out = tmp_path_factory.mktemp("repo") / "debian"
    done = build(keys, "site", out, packages)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def host(repository):
    """A host without nbagent, on which the repository is served."""
    with Host.up(name=f"rp-{os.getpid()}"[:16]) as host:
        host.run(["mkdir", "/srv/repo"])
        host.copy_in(list(repository.iterdir()), "/srv/repo/")
        server = host.popen(["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/srv/repo", "8088"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            host.run(["curl", "-sfo", "/dev/null", "--retry", "30", "--retry-delay", "1", "--retry-connrefused", URL])
            yield host
        finally:
            server.kill()
            server.wait()


def update(host, sources):
    """apt-get update with this file, and no list of an earlier one: exit status and output."""
    host.run(["tee", SOURCES], input=sources)
    host.run(["sh", "-c", "rm -rf /var/lib/apt/lists/*"])
    done = host.run(["apt-get", "-q", "update"], check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


def with_key_of(keys, name, repository):
    """nbagent.sources with another key."""
    block = gpg(keys, "--armor", "--export", name)
    key = "\n".join(f" {line or '.'}" for line in block.rstrip().splitlines())
    return re.sub(r"(?s)(?<=Signed-By:\n).*", f"{key}\n", (repository / "nbagent.sources").read_text())


def test_a_repository_with_the_key_of_another_is_refused(host, repository, keys):
    status, output = update(host, with_key_of(keys, "other", repository))
    assert status == 100 and "NO_PUBKEY" in output and f"{URL} nbagent InRelease' is not signed" in output, output
    assert host.run(["apt-get", "-q", "install", "-y", "nbagent"], check=False).returncode == 100


def test_an_expired_key_is_refused_and_its_repository_is_not_built(host, repository, keys, packages, tmp_path):
    fingerprint = re.search(r"^fpr:+(\w+):", gpg(keys, "--with-colons", "--list-keys", "site"), re.MULTILINE)[1]
    copy = tmp_path / "gpg"
    subprocess.run(["cp", "-a", str(keys), str(copy)], check=True)
    try:
        gpg(copy, "--quick-set-expire", fingerprint, "seconds=1")
        time.sleep(2.1)  # seconds of the clock, which gpg compares
        status, output = update(host, with_key_of(copy, "site", repository))
        assert status == 100 and "EXPKEYSIG" in output, output
        # With the lists of an earlier update apt continues, and reports the key as an error only if it is asked to.
        expired = host.run(["cat", SOURCES]).stdout
        assert update(host, (repository / "nbagent.sources").read_text())[0] == 0
        host.run(["tee", SOURCES], input=expired)
        done = host.run(["apt-get", "-q", "update", "--error-on=any"], check=False)
        assert done.returncode == 100 and "EXPKEYSIG" in done.stdout + done.stderr, done.stderr
        done = build(copy, "site", tmp_path / "out", packages)
        assert done.returncode == 1 and "the key site expired on 20" in done.stderr, done.stderr
        assert "--quick-set-expire" in done.stderr and not (tmp_path / "out").exists()
    finally:
        subprocess.run(["gpgconf", "--homedir", str(copy), "--kill", "all"], check=True)


def test_a_package_that_was_copied_in_part_is_refused(host, repository):
    assert update(host, (repository / "nbagent.sources").read_text())[0] == 0
    file = "/srv/repo/pool/main/n/nbagent/python3-nbagent_*.deb"
    host.run(["sh", "-c", f"cp {file} /root/whole.deb && truncate -s 1000 {file}"])
    try:
        done = host.run(["apt-get", "-q", "install", "-y", "nbagent"], check=False)
        assert done.returncode == 100 and "python3-nbagent" in done.stderr, done.stderr
        assert host.run(["sh", "-c", "dpkg-query -W 'nbagent*' 'python3-nbagent*'; true"]).stdout == ""
    finally:
        host.run(["sh", "-c", f"mv /root/whole.deb $(ls {file})"])


def test_a_bare_host_installs_nbagent_from_the_repository(host, repository):
    assert update(host, (repository / "nbagent.sources").read_text())[0] == 0
    host.run(["apt-get", "-q", "install", "-y", "nbagent", "nbagent-image-minimal"], timeout=900)
    product.wait_warm(host)
    claim = json.loads(host.run(["curl", "-sS", "localhost:9000/claim"]).stdout)
    assert claim["url"].startswith("http://localhost:8000/user/")
    policy = host.run(["apt-cache", "policy", "nbagent"]).stdout
    assert URL in policy and "(none)" not in policy
    # The completion of the command is where bash looks.
    completion = "source /usr/share/bash-completion/completions/nbagent; COMP_WORDS=(nbagent relea) COMP_CWORD=1"
    done = host.run(["bash", "-c", f"{completion}; _nbagent_completion nbagent; echo ${{COMPREPLY[@]}}"])
    assert done.stdout == "release\n"


def test_a_package_that_cannot_be_read_leaves_the_repository_as_it_was(keys, repository, packages, tmp_path):
    broken = tmp_path / packages[0].name
    broken.write_bytes(packages[0].read_bytes()[:1000])
    before = sorted(repository.rglob("*"))
    done = build(keys, "site", repository, [broken, *packages[1:]])
    assert done.returncode == 1 and str(broken) in done.stderr, done.stderr
    assert sorted(repository.rglob("*")) == before
    assert sorted(path.name for path in repository.parent.iterdir()) == [repository.name]
