# SPDX-License-Identifier: BSD-3-Clause
"""The reference of the settings: configuration files and manual pages, generated from the dataclasses.

packaging/settings writes them. This module has the texts for nbagent.toml and nbagent.toml(5), and
nbagent.gateway.reference those for gateway.toml and nbagent-gateway.toml(5).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from nbagent.config.host_config import HostConfig, ImageSettings

TOML_HEAD = """\
# nbagent: settings of the notebook agent on this host. Every setting is here, commented out, at its default.
# Change a setting here, or in a file /etc/nbagent/conf.d/NAME.toml, which is read after this one. Then run:
#   nbagent config check && systemctl reload nbagent.service nbagent-api.service nbagent-router.service
# Sizes: "512M", "1G". Times: "90s", "30min", "12h". See nbagent.toml(5).
"""

TOML_TAIL = """
# Settings of one image, by its name.
#[images.minimal]
"""

MAN_HEAD = r""".TH NBAGENT.TOML 5 "2026-11-22" "nbagent" "File formats"
.SH NAME
nbagent.toml \- settings of the notebook agent
.SH SYNOPSIS
.I /etc/nbagent/nbagent.toml
.br
.I /etc/nbagent/conf.d/*.toml
.SH DESCRIPTION
The supervisor, the API and the router of
.BR nbagent.service (8)
read these files.
The files in
.I conf.d
are read after
.I nbagent.toml
in the order of their names; a setting in a later file overrides the same setting in an earlier one.
Every setting has a default that works on a single host.
.PP
.B nbagent config check
checks the files.
An unknown setting or a wrong value is an error; the message names the file, the setting and the expected value.
A service with such an error does not start, and on a reload it keeps the settings that it has.
.PP
Settings take effect with
.BR "systemctl reload nbagent.service nbagent\-api.service nbagent\-router.service" .
Running slots keep the limits that they were started with.
.SH VALUES
.TP
Sizes
Bytes, or a number with the suffix K, M, G or T, which are powers of 1024: \(dq512M\(dq.
.TP
Times
Seconds, or numbers with the suffixes ms, s, min, h or d: \(dq90s\(dq, \(dq1h30min\(dq.
.TP
Processor time
A share of the host, \(dq1/32\(dq, or of one processor, \(dq50%\(dq, \(dq150%\(dq.
"""

MAN_TAIL = r""".SH EXAMPLE
.nf
# /etc/nbagent/conf.d/lab.toml
[host]
label = \(dqc07\(dq

[api]
trusted_networks = [\(dq127.0.0.0/8\(dq, \(dq10.1.0.0/16\(dq]

[slots]
memory = \(dq2G\(dq
cpu_quota = \(dq1/8\(dq

[pool]
warm = 16
.fi
.SH FILES
.TP
.I /etc/nbagent/token
The token of the API.
Clients that send it in the header
.B Authorization: Bearer
may call the API from any network.
The package creates it at installation, and only root can read it.
A new token is valid within seconds, because its file is watched.
.SH SEE ALSO
.BR nbagent (1),
.BR nbagent.service (8)
"""


@dataclass(frozen=True)
class Document:
    """The settings of one program: dataclasses, and the texts before and after the generated part.

    `named` is the name of a table that exists once for each name, and `named_kind` its dataclass.
    """

    root: type
    named: str
    named_kind: type
    toml: tuple[str, str]
    man: tuple[str, str]


HOST = Document(HostConfig, "images.NAME", ImageSettings, (TOML_HEAD, TOML_TAIL), (MAN_HEAD, MAN_TAIL))


def sections(document: Document) -> Iterator[tuple[str, str, type]]:
    """Name, description and dataclass of each table except the named ones."""
    for table in dataclasses.fields(document.root):
        if "tables" not in table.metadata:
            kind = type(getattr(document.root(), table.name))
            yield table.name, sentence(kind), kind


def sentence(kind: type) -> str:
    """The description in a table's docstring, which follows the table's name and a colon."""
    text = (kind.__doc__ or "").split(": ", 1)[1]
    return text[0].upper() + text[1:]


def toml(document: Document) -> str:
    """The configuration file, with every setting commented out at its default."""
    parts = [document.toml[0]]
    for name, text, kind in sections(document):
        parts.append(f"\n# {text}\n[{name}]\n")
        parts += [f"\n# {doc}\n#{key} = {default}\n" for key, doc, default in entries(kind)]
    parts.append(document.toml[1])
    parts += [f"# {doc}\n#{key} = {default}\n" for key, doc, default in entries(document.named_kind)]
    return "".join(parts)


def man(document: Document) -> str:
    """The manual page."""
    parts = [document.man[0]]
    for name, text, kind in [*sections(document), (document.named, sentence(document.named_kind), document.named_kind)]:
        parts.append(f".SH [{name}]\n{roff(text)}\n")
        for key, doc, default in entries(kind):
            parts.append(f".TP\n.BI {key} \" = \" {roff_argument(default)}\n{roff(doc)}\n")
    parts.append(document.man[1])
    return "".join(parts)


def entries(kind: type) -> Iterator[tuple[str, str, str]]:
    """Name, description and default, in TOML, of each setting of a table."""
    for setting in dataclasses.fields(kind):
        # JSON and TOML have the same notation for text, numbers and lists of them.
        yield setting.name, setting.metadata["doc"], json.dumps(setting.metadata["default"])


def roff(text: str) -> str:
    """`text` escaped for a paragraph of roff."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")


def roff_argument(text: str) -> str:
    """`text` escaped for one argument of a roff macro."""
    return roff(text).replace(" ", "\\ ")
