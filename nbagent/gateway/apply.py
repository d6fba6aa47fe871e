"""What HAProxy reads, written of the settings: its configuration and certificates, below /run.

gateway.toml is the truth. What is written here is made anew by every start and reload, and by
nothing else; a configuration that HAProxy would refuse does not take the place of a good one.
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
# As Debian's ACME clients lay them down.
_CHAIN, _KEY = "fullchain.pem", "privkey.pem"


def write(settings: GatewaySettings, run: Path = Path(haproxy.RUN)) -> Path:
    """Writes and checks all that HAProxy reads, for its user; gives the configuration's path. Raises ConfigError."""
    owner = pwd.getpwnam(USER)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=run))
    try:
        _fill(settings, new)
        for path in (new, *new.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        check(new / CONFIG)
        certificates = Path(haproxy.CERTIFICATES)
        if (new / certificates.name).is_dir():
            # HAProxy reads them when it starts, under this lasting name.
            shutil.rmtree(run / certificates.name, ignore_errors=True)
            (new / certificates.name).rename(run / certificates.name)
        text = haproxy.render(settings)
        (new / CONFIG).write_text(text)
        (new / CONFIG).replace(run / CONFIG)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return run / CONFIG


def try_out(settings: GatewaySettings) -> str:
    """What HAProxy says about the settings, which it takes. Raises ConfigError when it does not."""
    with tempfile.TemporaryDirectory() as directory:
        _fill(settings, Path(directory))
        return check(Path(directory, CONFIG))


def check(config: Path) -> str:
    """HAProxy's words on a configuration. Raises ConfigError."""
    done = subprocess.run([HAPROXY, "-c", "-f", str(config)], capture_output=True, text=True, check=False)
    said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("[NOTICE]"))
    if done.returncode:
        raise ConfigError(f"HAProxy refuses the configuration: {said}", file=str(config))
    return said


def _fill(settings: GatewaySettings, directory: Path) -> None:
    """The configuration, for a look at it, with the certificates in `directory` itself."""
    text = haproxy.render(settings)
    if settings.tls.certificates:
        certificates = directory / Path(haproxy.CERTIFICATES).name
        certificates.mkdir(mode=0o700)
        for place, source in enumerate(settings.tls.certificates):
            with open(os.open(certificates / f"{place:03}.pem", os.O_WRONLY | os.O_CREAT, 0o400), "wb") as file:
                file.write(read_certificate(Path(source)))
        text = text.replace(haproxy.CERTIFICATES, str(certificates))
    (directory / CONFIG).write_text(text)


def read_certificate(path: Path) -> bytes:
    """Certificates and key as HAProxy wants them, in one. Raises ConfigError."""
    try:
        parts = [(path / name).read_bytes() for name in (_CHAIN, _KEY)] if path.is_dir() else [path.read_bytes()]
    except OSError as error:
        raise ConfigError(
            f"tls.certificates: {error.filename}: {error.strerror}", key="tls.certificates", file=str(path)
        ) from None
    return b"\n".join(parts)
