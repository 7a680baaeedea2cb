"""The modules beside these tests are imported by their own names, as the script survey.py imports them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
