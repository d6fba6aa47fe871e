# SPDX-License-Identifier: BSD-3-Clause
"""The check of the router's whole configuration by nginx itself, before any of it is put into force.

The operator's own files in /etc/nbagent/router.d may have errors that only nginx finds. The check is done with a copy
in a temporary directory, and changes nothing of the router that runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from nbagent.core import paths

NGINX = "/usr/sbin/nginx"
_TIMEOUT_S = 30.0


def check(settings: str, files: Path = paths.ROUTER_FILES, config: Path = paths.ROUTER_CONFIG) -> str | None:
    """The error of nginx for the generated `settings` with the operator's `files`; None if it accepts them.

    Raises OSError when nginx cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="nbagent-router-") as name:
        directory = Path(name)
        (directory / "settings.conf").write_text(settings)
        (directory / "listen.conf").write_text(f"listen unix:{directory}/socket;\n")
        (directory / "workers.conf").touch()
        text = config.read_text().replace(str(paths.ROUTER_FILES_COPY), str(files)).replace(str(paths.ROUTER_RUN), name)
        (directory / "nginx.conf").write_text(text)
        done = subprocess.run(
            [NGINX, "-t", "-q", "-e", "stderr", "-c", str(directory / "nginx.conf")],
            capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S,
        )
        if done.returncode == 0:
            return None
        # After the time and the pid of this nginx.
        errors = re.findall(r"\[emerg\] (?:\d+#\d+: )?(.*)", done.stderr)
        error = errors[0] if errors else done.stderr.strip() or f"nginx -t exited with status {done.returncode}"
        return error.replace(f"{name}/settings.conf", "the settings that are generated from nbagent.toml")
