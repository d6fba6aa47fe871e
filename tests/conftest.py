# SPDX-License-Identifier: BSD-3-Clause
"""Makes the modules beside this file importable, and gives the tests the ordinary scheduling policy and priority."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A test that inherits a real-time policy takes the processors from its hosts, and none of its commands may enter one
# (see testhost_driver/launch.py). The priority is passed on to what tests execute in a host.
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
os.setpriority(os.PRIO_PROCESS, 0, 0)
