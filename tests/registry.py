# SPDX-License-Identifier: BSD-3-Clause
"""A registry of container images, read-only, on loopback: the blobs of one OCI layout.

    python3 registry.py LAYOUT PORT [USER:PASSWORD]

Only the endpoints of a pull: https://github.com/opencontainers/distribution-spec/blob/main/spec.md. With a login it
requires a token, which its endpoint /token issues for the login, as the registries of Docker, GitHub and GitLab do. It
is an HTTP proxy too, which serves every host by itself. Each request is a line on standard output.
"""

import base64
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LAYOUT, PORT, LOGIN = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
TOKEN = "token-of-the-login"
TAG = "org.opencontainers.image.ref.name"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        by_proxy = re.match("http://[^/]+", self.path)
        self.path = self.path[by_proxy.end():] if by_proxy else self.path
        given = self.headers.get("Authorization", "")
        if self.path.startswith("/token"):
            known = given == "Basic " + base64.b64encode(LOGIN.encode()).decode()
            self.respond(json.dumps({"token": TOKEN if known else "anonymous"}).encode(), "application/json")
        elif LOGIN and given != f"Bearer {TOKEN}":
            self.send_response(401)
            realm = f'Bearer realm="http://127.0.0.1:{PORT}/token",service="registry"'
            self.send_header("WWW-Authenticate", realm)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/v2/":
            self.respond(b"{}", "application/json")
        elif found := re.fullmatch(r"/v2/[a-z/]+/(manifests|blobs)/([\w:.-]+)", self.path):
            digest, kind = found[2], "application/octet-stream"
            if found[1] == "manifests":
                for item in json.loads((LAYOUT / "index.json").read_text())["manifests"]:
                    if digest in (item["annotations"][TAG], item["digest"]):
                        digest, kind = item["digest"], item["mediaType"]
            blob = LAYOUT / "blobs" / digest.replace(":", "/")
            if blob.is_file():
                self.respond(blob.read_bytes(), kind, digest)
            else:
                self.send_error(404)
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815  the name that http.server calls

    def log_message(self, form, *arguments):
        print(self.command, self.requestline, flush=True)

    def respond(self, content, kind, digest=None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
