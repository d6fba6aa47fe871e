# SPDX-License-Identifier: BSD-3-Clause
"""A registry of container images, read-only, on loopback: the blobs of one OCI layout.

    python3 registry.py LAYOUT PORT

Only the endpoints of a pull: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LAYOUT, PORT = Path(sys.argv[1]), int(sys.argv[2])
TAG = "org.opencontainers.image.ref.name"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/v2/":
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
