"""What every HTTP service of nbagent shares: the gunicorn application and token files."""
