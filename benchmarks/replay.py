"""Our replay beside its peers and the machine's floor: ``python benchmarks/replay.py --help``."""

import sys

from angle_rl.bench.replay import main

if __name__ == "__main__":
    sys.exit(main())
