"""What meta-learning adds to the updates of an agent: ``python benchmarks/meta.py --help``."""

import sys

from angle_rl.bench.meta import main

if __name__ == "__main__":
    sys.exit(main())
