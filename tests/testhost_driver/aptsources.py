# SPDX-License-Identifier: BSD-3-Clause
"""The Debian mirror that this machine uses, read from its apt configuration, so that no mirror is named in the
code.

Both forms of `sources.list(5)` are parsed: one-line and deb822. `apt-get indextargets` gives the same list, but
only after an `apt-get update`.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from testhost_driver.errors import BuildFailed

CODENAMES = {"bullseye", "bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"}
ETC_APT = Path("/etc/apt")


@dataclasses.dataclass(frozen=True)
class Source:
    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str

    @property
    def codename(self) -> str:
        return re.sub(r"(-updates|-security|/updates)$", "", self.suite)

    @property
    def is_security(self) -> bool:
        return self.suite.endswith(("-security", "/updates"))

    @property
    def is_debian(self) -> bool:
        """Whether this is Debian's own archive, not a third-party repository that uses the name of a Debian release."""
        archive_key = not self.signed_by or "debian-archive" in self.signed_by
        return self.codename in CODENAMES and "main" in self.components and archive_key


def sources_lines(suite: str) -> list[str]:
    """One-line sources for `suite`, from the machine's mirrors; security too where the machine uses it."""
    debian = [source for source in _read(ETC_APT) if source.is_debian]
    # A one-line entry without `signed-by` has no key to identify it, but a Debian mirror has "debian" in its URI.
    debian.sort(key=lambda source: "debian" not in source.uri)
    main = [source for source in debian if not source.is_security]
    security = [source for source in debian if source.is_security]
    if not main:
        raise BuildFailed(
            f"no Debian mirror in {ETC_APT}: there must be a source with a Debian suite and `main`"
        )
    lines = [f"deb {main[0].uri} {name} main" for name in (suite, f"{suite}-updates")]
    return lines + [f"deb {source.uri} {suite}-security main" for source in security[:1]]


def proxy_options() -> list[str]:
    """The machine's `Acquire::…::Proxy` settings as options: a bootstrap reads no apt.conf of the machine."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return [
        line for line in dump.splitlines() if re.match(r'Acquire::[a-z:]*proxy[a-z:-]* ".+";', line, re.I)
    ]


def _read(etc_apt: Path) -> Iterator[Source]:
    parts = etc_apt / "sources.list.d"
    for path in [etc_apt / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]:
        if path.is_file():
            text = path.read_text(errors="replace")
            yield from _deb822(text) if path.suffix == ".sources" else _one_line(text)


def _one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#]+)", line)
        if match and len(words := match["rest"].split()) >= 3:
            options = dict(o.split("=", 1) for o in (match["options"] or "").split() if "=" in o)
            yield Source(words[0], words[1], tuple(words[2:]), options.get("signed-by", ""))


def _deb822(text: str) -> Iterator[Source]:
    text = re.sub(r"(?m)^#.*\n?", "", text)
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            match[1].lower(): match[2].strip()
            for match in re.finditer(r"(?m)^([A-Za-z-]+):((?:.*)(?:\n[ \t].*)*)", stanza)
        }
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, components, fields.get("signed-by", ""))
