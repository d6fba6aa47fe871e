# SPDX-License-Identifier: BSD-3-Clause
"""JupyterHub with users that its API makes and that log in without a password: a side of `make bench` and `bench-page`.

Hub, proxy and users on one host, by its defaults where it has some; limits of time and of starts at once are lifted,
so that a burst is answered whole.
"""

import os

c = get_config()  # noqa: F821 - JupyterHub's
at = os.environ["BENCH_AT"]
c.JupyterHub.bind_url = "http://127.0.0.1:8100"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:8101"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:8102"
c.ConfigurableHTTPProxy.command = [f"{at}/proxy/node_modules/.bin/configurable-http-proxy"]
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = os.environ["BENCH_SPAWNER"]
c.JupyterHub.services = [{"name": "bench", "api_token": os.environ["BENCH_TOKEN"]}]
scopes = ["admin:users", "admin:servers", "access:servers"]
c.JupyterHub.load_roles = [{"name": "bench", "services": ["bench"], "scopes": scopes}]
c.JupyterHub.concurrent_spawn_limit = 0
c.JupyterHub.tornado_settings = {"slow_spawn_timeout": 0}
c.Spawner.cmd = [f"{at}/hub/bin/jupyterhub-singleuser"]
c.Spawner.start_timeout = 280
c.Spawner.http_timeout = 280
c.Spawner.mem_limit = "1G"
c.SystemdSpawner.dynamic_users = True
