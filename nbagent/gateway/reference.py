# SPDX-License-Identifier: BSD-3-Clause
"""The reference of a gateway's settings: the texts for gateway.toml and nbagent-gateway.toml(5)."""

from __future__ import annotations

from nbagent.config.reference import Document
from nbagent.gateway.settings import FleetHostSettings, GatewaySettings

TOML_HEAD = """\
# nbagent-gateway: settings of a fleet's landing page. Every setting is here, commented out, at its default.
# Change a setting here, or in a file /etc/nbagent/gateway.d/NAME.toml, which is read after this one. Then run:
#   nbagent gateway check && nbagent gateway apply
# Times: "90s", "30min", "12h". See nbagent-gateway.toml(5).
"""

TOML_TAIL = """
# A host of the fleet, by its label, which is the first part of its slots' ids. `nbagent gateway add-host` writes such a
# table to a file in gateway.d and adds the host to the running gateway.
#[hosts.c07]
"""

MAN_HEAD = r""".TH NBAGENT-GATEWAY.TOML 5 "2026-11-24" "nbagent" "File formats"
.SH NAME
nbagent\-gateway.toml \- settings of the gateway of a fleet
.SH SYNOPSIS
.I /etc/nbagent/gateway.toml
.br
.I /etc/nbagent/gateway.d/*.toml
.SH DESCRIPTION
.BR nbagent\-gateway.service (8)
and
.BR nbagent\-gateway\-status.service (8)
read these files.
The files in
.I gateway.d
are read after
.I gateway.toml
in the order of their names; a setting in a later file overrides the same setting in an earlier one.
.PP
.B nbagent gateway check
checks the files, and whether HAProxy accepts the configuration that is generated from them.
An unknown setting or a wrong value is an error; the message names the file, the setting and the expected value.
.B nbagent gateway apply
applies the settings without closing a connection.
.PP
Hosts are listed, each in a table
.BR [hosts.LABEL] ,
or found with DNS.
With
.B fleet.srv
the first part of the target name of a record is the host's label, and requests for the slots of that host are sent
to that target:
.nf
_nbagent._tcp.hosts.example.org. SRV 0 0 8000 c07.hosts.example.org.
.fi
.SH VALUES
.TP
Times
Seconds, or numbers with the suffixes ms, s, min, h or d: \(dq90s\(dq, \(dq1h30min\(dq.
"""

MAN_TAIL = r""".SH EXAMPLE
.nf
# /etc/nbagent/gateway.d/site.toml
[tls]
certificates = [\(dq/etc/letsencrypt/live/nb.example.org\(dq]
acme = \(dq127.0.0.1:8402\(dq

[landing]
title = \(dqTry the course\(dq
rate = 20

[hosts.c07]
address = \(dq10.1.0.7\(dq

[hosts.c08]
address = \(dq10.1.0.8\(dq
.fi
.SH SEE ALSO
.BR nbagent (1),
.BR nbagent\-gateway.service (8),
.BR nbagent.toml (5)
"""

GATEWAY = Document(
    GatewaySettings, "hosts.LABEL", FleetHostSettings, (TOML_HEAD, TOML_TAIL), (MAN_HEAD, MAN_TAIL)
)
