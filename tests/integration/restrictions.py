# SPDX-License-Identifier: BSD-3-Clause
"""Runs taken_over.py on a host, without restrictions and under those of a unit of nbagent."""

import re
from pathlib import Path

from testhost_driver import Host

PROGRAM = "/usr/local/lib/taken_over.py"
UNIT = "/run/systemd/system/taken-over.service"
# A oneshot copy of a service has none of these.
OTHER_DIRECTIVES = re.compile(
    r"(Exec\w+|Type|Sockets|Watchdog\w+|Restart\w*|RuntimeDirectory\w*|Requires|Wants|After|WantedBy)=|\[Install\]|#"
)


def attempts_of(host: Host, unit: str, *words: str) -> tuple[list[str], list[str]]:
    """The lines that `taken_over.py WORDS` prints as root without restrictions, and under those of a unit."""
    host.copy_in(str(Path(__file__).with_name("taken_over.py")), PROGRAM)
    host.run(["chmod", "644", PROGRAM])
    free = host.run(["python3", PROGRAM, *words]).stdout.splitlines()
    lines = host.run(["systemctl", "cat", unit]).stdout.splitlines()
    kept = [line for line in lines if not OTHER_DIRECTIVES.match(line)]
    start = f"ExecStart=/usr/bin/python3 -I {PROGRAM} {' '.join(words)}"
    host.run(["tee", UNIT], input="\n".join([*kept, "[Service]", start, "Type=oneshot", ""]))
    try:
        host.run(["systemctl", "daemon-reload"])
        since = host.run(["date", "+%s.%N"]).stdout.strip()
        host.run(["systemctl", "start", "taken-over.service"])
        show = ["journalctl", "-u", "taken-over.service", "-o", "cat", "--since", f"@{since}", "_COMM=python3"]
        return free, host.run(show).stdout.splitlines()
    finally:
        host.run(["rm", UNIT, PROGRAM])
        host.run(["systemctl", "daemon-reload"])
