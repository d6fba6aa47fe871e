# SPDX-License-Identifier: BSD-3-Clause
"""Paths of nbagent's files on a host.

The units, packaging/nbagent.tmpfiles and packaging/router/nginx.conf name the same paths, because systemd and nginx
read them without Python. Paths inside a slot are in nbagent.sandbox.plan.
"""

from __future__ import annotations

from pathlib import Path

ETC = Path("/etc/nbagent")
HOST_SETTINGS = ETC / "nbagent.toml"
GATEWAY_SETTINGS = ETC / "gateway.toml"
TOKEN = ETC / "token"
LANDING_TOKEN = ETC / "landing-token"
DNS_KEY = ETC / "dns-key"
REGISTRY_AUTH = ETC / "registry-auth.json"

IMAGES = Path("/var/lib/nbagent/images")
BUILD_CACHE = Path("/var/cache/nbagent")
# Empty. The supervisor sees by it how full the file system of the journal is, and none of the journal's files.
LOGS = Path("/var/log/nbagent")
IMAGE_BUILDER = Path("/usr/lib/nbagent/build-image")

RUN = Path("/run/nbagent")
SLOTS = RUN / "slots"
# The end of each session, for its page.
SESSIONS = RUN / "sessions"
# Empty on the host. Each slot mounts its root over it, in a mount namespace of its own.
SANDBOX = RUN / "sandbox"
# The files below /sys of all slots.
SYSTEM_FILES = RUN / "sys"
# Exists while the host drains.
DRAIN = RUN / "drain"
CONTROL_SOCKET = RUN / "control.sock"
LANDING_SOCKET = RUN / "landing.sock"
NETWORK_SOCKET = RUN / "network.sock"
LAUNCH_SOCKET = RUN / "launch.sock"
UNITS_SOCKET = RUN / "units.sock"
CRASH_POINT = RUN / "crash-point"
ROUTER_CHECK_SOCKET = RUN / "router-check.sock"
NETWORK_RULES = RUN / "network.json"
DNS_CONFIG = RUN / "dns.conf"

# The link of nbagent-modules.service, in the file system bpf of the host.
MODULE_REQUESTS = Path("/sys/fs/bpf/nbagent-module-requests")

ROUTER_CONFIG = Path("/usr/lib/nbagent/router.conf")
# The operator's additions to it, and the router's generated files with a copy of those.
ROUTER_FILES = ETC / "router.d"
ROUTER_RUN = Path("/run/nbagent-router")
ROUTER_FILES_COPY = ROUTER_RUN / "router.d"

GATEWAY_RUN = Path("/run/nbagent-gateway")
GATEWAY_STATUS_SOCKET = Path("/run/nbagent-gateway-status.sock")
GATEWAY_PAGES = Path("/usr/share/nbagent/gateway")
