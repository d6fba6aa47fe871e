# SPDX-License-Identifier: BSD-3-Clause
"""The Python package nbagent, from which packaging/build-deb makes the .debs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "nbagent/__init__.py").read_text(), re.MULTILINE)
assert VERSION

setup(
    name="nbagent",
    version=VERSION[1],
    description="Live Jupyter notebooks at once, each a systemd scope on a plain Linux host",
    author="The nbagent developers",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Named as PyPI names them; dh_python3 turns each of the first into what python3-nbagent depends on. The others are
    # in packaging/debian/control, at the package that runs what needs them.
    install_requires=["click", "rich"],
    extras_require={
        "agent": ["flask", "gunicorn", "h11", "prometheus-client", "psutil", "pyroute2", "pystemd", "systemd-python"],
        "dns": ["dnspython", "systemd-python"],
        "gateway": ["flask", "gunicorn", "h11"],
    },
    packages=find_packages(include=["nbagent", "nbagent.*"]),
    package_data={"nbagent": ["py.typed", "**/*.js", "**/*.json", "**/*.html"]},
    entry_points={"console_scripts": ["nbagent = nbagent.cli:main"]},
    zip_safe=False,
)
