# SPDX-License-Identifier: BSD-3-Clause
"""Runs one server of OpenStack Swift: swift_server.py CONFIG SECTION. Debian's python3-swift has no programs for it.

`swift_server.py ring FILE PORT` writes the ring of a server with one device.

As a module it has the cache of the proxy server: a dictionary in place of memcached, because there is one process.
"""

import os
import sys
import time


class Cache:
    """The part of swift.common.memcached.MemcacheRing that the proxy server uses."""

    def __init__(self):
        self.values = {}

    def get(self, key, **_):
        value, end_s = self.values.get(key, (None, 0))
        return value if end_s > time.monotonic() else None

    def set(self, key, value, time=0, **_):
        self.values[key] = value, _end(time)

    def incr(self, key, delta=1, time=0, **_):
        self.set(key, int(self.get(key) or 0) + delta, time)
        return self.get(key)

    def delete(self, key, **_):
        self.values.pop(key, None)


def _end(seconds):
    return time.monotonic() + (seconds or 86400)


def filter_factory(_global, **_):
    """The filter for the pipeline in the proxy server's configuration."""
    cache = Cache()

    def add(application):
        def serve(environ, start_response):
            environ["swift.cache"] = cache
            return application(environ, start_response)

        return serve

    return add


def write_ring(path, port):
    from swift.common.ring import RingBuilder

    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1})
    builder.rebalance()
    builder.get_ring().save(path)


if __name__ == "__main__":
    if sys.argv[1] == "ring":
        write_ring(sys.argv[2], int(sys.argv[3]))
        sys.exit()
    from swift.common.utils import set_swift_dir
    from swift.common.wsgi import run_wsgi

    set_swift_dir(os.path.dirname(sys.argv[1]))
    sys.exit(run_wsgi(sys.argv[1], sys.argv[2]))
