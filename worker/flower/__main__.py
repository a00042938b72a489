"""``python -m worker.flower``."""

from __future__ import annotations

import sys

from worker.flower import main

if __name__ == "__main__":
    main(sys.argv[1:])
