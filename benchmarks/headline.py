"""Writes the README's headline table: ``python benchmarks/headline.py replay.json update.json``."""

import sys

from angle_rl.bench.headline import main

if __name__ == "__main__":
    sys.exit(main())
