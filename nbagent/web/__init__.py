"""Parts that every HTTP service of nbagent shares: problem documents, CORS, keys, tokens, the gunicorn application."""
