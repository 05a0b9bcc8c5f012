"""The environments' entries in Gymnasium's registry: names of classes, nothing imported ahead.

Gymnasium and NumPy take several times as long to import as ``angle_rl`` itself, so registering does not
import them: it waits for whoever does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = ("Gridworld", "Turtleworld")
STEP_LIMIT = 100  # an episode's steps, for both, single or vectorised


def register_with_gymnasium() -> None:
    """Register the environments now if Gymnasium is loaded, else as soon as it is."""
    if "gymnasium" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterGymnasium) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterGymnasium())


def _register() -> None:
    from gymnasium.envs.registration import register, registry

    for name in NAMES:
        if f"angle/{name}-v0" not in registry:
            module = f"angle_rl.envs.{name.lower()}"
            register(
                f"angle/{name}-v0",
                entry_point=f"{module}:{name}",
                vector_entry_point=f"{module}:{name}Vector",
                max_episode_steps=STEP_LIMIT,
            )


class _AfterGymnasium:
    """An import finder that finds Gymnasium as the others do, registers once it has run, and leaves."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The other finders' spec of ``gymnasium``, with a loader that registers; None for any other module."""
        if name != "gymnasium":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._follow(spec)
                return spec
        return None

    def _follow(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
