"""Kernel facilities, one a file: thin wrappers, named as in the kernel's headers, that raise OSError."""
