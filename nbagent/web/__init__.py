# SPDX-License-Identifier: BSD-3-Clause
"""Parts that every HTTP service of nbagent shares: problem documents, CORS, keys, tokens, the gunicorn application."""
