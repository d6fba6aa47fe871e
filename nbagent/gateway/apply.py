# SPDX-License-Identifier: BSD-3-Clause
"""Writes the files that HAProxy reads, its configuration and certificates, to a directory in /run.

They are generated from gateway.toml at every start and reload of nbagent-gateway.service. The configuration is
replaced only after HAProxy has checked the new one, so an error in the settings leaves the previous one in place.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from nbagent.core.errors import ConfigError
from nbagent.gateway import haproxy
from nbagent.gateway.settings import GatewaySettings

HAPROXY = "/usr/sbin/haproxy"
USER = "nbagent-gateway"
CONFIG = "haproxy.cfg"
# Names that Debian's ACME clients use in a certificate's directory.
_CHAIN, _KEY = "fullchain.pem", "privkey.pem"


def write(settings: GatewaySettings, run: Path = Path(haproxy.RUN)) -> Path:
    """Write and check the files, owned by HAProxy's user; returns the configuration's path. Raises ConfigError."""
    owner = pwd.getpwnam(USER)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=run))
    try:
        _write_for_check(settings, new)
        for path in (new, *new.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        check(new / CONFIG)
        certificates = Path(haproxy.CERTIFICATES)
        if (new / certificates.name).is_dir():
            # The configuration names this directory, and HAProxy reads it at a start and a reload.
            shutil.rmtree(run / certificates.name, ignore_errors=True)
            (new / certificates.name).rename(run / certificates.name)
        text = haproxy.render(settings)
        (new / CONFIG).write_text(text)
        (new / CONFIG).replace(run / CONFIG)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return run / CONFIG


def try_out(settings: GatewaySettings) -> str:
    """HAProxy's warnings about the settings. Raises ConfigError if HAProxy refuses them."""
    with tempfile.TemporaryDirectory() as directory:
        _write_for_check(settings, Path(directory))
        return check(Path(directory, CONFIG))


def check(config: Path) -> str:
    """HAProxy's warnings about a configuration file. Raises ConfigError if HAProxy refuses it."""
    done = subprocess.run([HAPROXY, "-c", "-f", str(config)], capture_output=True, text=True, check=False)
    messages = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("[NOTICE]"))
    if done.returncode:
        raise ConfigError(f"HAProxy refuses the configuration: {messages}", file=str(config))
    return messages


def _write_for_check(settings: GatewaySettings, directory: Path) -> None:
    """Write a configuration to `directory` for a check, with the certificates in the same directory."""
    text = haproxy.render(settings)
    if settings.tls.certificates:
        certificates = directory / Path(haproxy.CERTIFICATES).name
        certificates.mkdir(mode=0o700)
        for number, source in enumerate(settings.tls.certificates):
            with open(os.open(certificates / f"{number:03}.pem", os.O_WRONLY | os.O_CREAT, 0o400), "wb") as file:
                file.write(read_certificate(Path(source)))
        text = text.replace(haproxy.CERTIFICATES, str(certificates))
    (directory / CONFIG).write_text(text)


def read_certificate(path: Path) -> bytes:
    """The certificate chain and the key in one text, as HAProxy requires. Raises ConfigError."""
    try:
        parts = [(path / name).read_bytes() for name in (_CHAIN, _KEY)] if path.is_dir() else [path.read_bytes()]
    except OSError as error:
        raise ConfigError(
            f"tls.certificates: {error.filename}: {error.strerror}", key="tls.certificates", file=str(path)
        ) from None
    return b"\n".join(parts)
