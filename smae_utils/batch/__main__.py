"""`python -m smae_utils.batch OUT NAME` executes one run of a batch: what the backends start."""

from __future__ import annotations

import signal
import sys

from smae_utils.batch.runs import execute

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(0 if execute(sys.argv[1], sys.argv[2]) == "done" else 2)
    except KeyboardInterrupt:
        sys.exit(130)
