"""One SAC update beside other implementations and the floor: ``python benchmarks/update.py --help``."""

import sys

from angle_rl.bench.update import main

if __name__ == "__main__":
    sys.exit(main())
