"""Where transitions come from: Gymnasium environments, single or vectorised, a function, or a data set.

A ``DataFeed`` runs ``n`` environments side by side; every array that it gives has a leading axis ``n``, also
for one environment. Observations of Dict and Tuple spaces are dicts and tuples of such arrays, in the dtypes
of the space. What it gives is never overwritten later. All randomness comes from the keys it is handed:
``init`` and ``reset`` seed the environments, so the same key gives the same episodes. What an environment
raises passes through untouched (but see VectorFeed), and rewards are passed on as they come, finite or not.
A feed belongs to one thread.
"""

from __future__ import annotations

from angle_rl.feed.dataset import DatasetFeed, offline
from angle_rl.feed.envpool import EnvPoolFeed
from angle_rl.feed.history import HistoryFeed
from angle_rl.feed.make import make_feed
from angle_rl.feed.normalize import NormalizedFeed, wrap_feed
from angle_rl.feed.protocol import DataFeed
from angle_rl.feed.resets import ResetsFeed
from angle_rl.feed.single import GymnasiumFeed
from angle_rl.feed.statistics import RunningStatistics
from angle_rl.feed.vector import VectorFeed
from angle_rl.feed.workers import VectorEnvironmentError
from angle_rl.feed.wrapping import around, export_feed_state, import_feed_state, make_evaluation_feed, unscaled_reward
from angle_rl.function_feed import FunctionFeed

__all__ = [
    "DataFeed",
    "DatasetFeed",
    "EnvPoolFeed",
    "FunctionFeed",
    "GymnasiumFeed",
    "HistoryFeed",
    "NormalizedFeed",
    "ResetsFeed",
    "RunningStatistics",
    "VectorEnvironmentError",
    "VectorFeed",
    "around",
    "export_feed_state",
    "import_feed_state",
    "make_evaluation_feed",
    "make_feed",
    "offline",
    "unscaled_reward",
    "wrap_feed",
]
