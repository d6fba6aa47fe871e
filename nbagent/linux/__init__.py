"""Kernel facilities, one a file: thin, named as in the kernel's headers, no policy, real OSErrors."""
