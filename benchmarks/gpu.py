"""Replay, operations and updates on a CUDA device, beside peers and floors: ``python benchmarks/gpu.py --help``."""

import sys

from angle_rl.bench.gpu import main

if __name__ == "__main__":
    sys.exit(main())
