"""MetaEntropy beside a learned and a fixed entropy coefficient: ``python benchmarks/meta_study.py --help``."""

import sys

from angle_rl.bench.meta_study import main

if __name__ == "__main__":
    sys.exit(main())
