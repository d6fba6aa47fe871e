# SPDX-License-Identifier: BSD-3-Clause
"""Makes the modules beside this file importable for every test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
