# SPDX-License-Identifier: BSD-3-Clause
"""The check of the router's whole configuration by nginx itself, before any of it is put into force.

The operator's own files in /etc/nbagent/router.d may have errors that only nginx finds. The check is done with a copy
in a temporary directory, and changes nothing of the router that runs.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

NGINX = "/usr/sbin/nginx"
CONFIG = Path("/usr/lib/nbagent/router.conf")
OPERATORS_FILES = Path("/etc/nbagent/router.d")
# Where the router has its generated files, and a copy of the operator's.
RUN = Path("/run/nbagent-router")
COPIED_FILES = RUN / "router.d"
_TIMEOUT_S = 30.0


def check(settings: str, files: Path = OPERATORS_FILES, config: Path = CONFIG) -> str | None:
    """The error of nginx for the generated `settings` with the operator's `files`; None if it accepts them.

    Raises OSError when nginx cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="nbagent-router-") as name:
        directory = Path(name)
        (directory / "settings.conf").write_text(settings)
        (directory / "listen.conf").write_text(f"listen unix:{directory}/socket;\n")
        text = config.read_text().replace(str(COPIED_FILES), str(files)).replace(str(RUN), name)
        (directory / "nginx.conf").write_text(text)
        done = subprocess.run(
            [NGINX, "-t", "-q", "-e", "stderr", "-c", str(directory / "nginx.conf")],
            capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S,
        )
        if done.returncode == 0:
            return None
        errors = [line.partition("] ")[2] for line in done.stderr.splitlines() if "[emerg]" in line]
        error = errors[0] if errors else done.stderr.strip() or f"nginx -t exited with status {done.returncode}"
        return error.replace(f"{name}/settings.conf", "the settings that are generated from nbagent.toml")
