"""Lets the commands of the documentation end in seconds: smaller networks, fewer images and epochs, the same code.

Python imports this at its start where PYTHONPATH names the folder; see test_docs.py.
"""

import importlib.abc
import importlib.machinery
import sys
import types

FEW = {"epochs": 1, "limit": 24, "batch_size": 8}


def shrink_models(models: types.ModuleType) -> None:
    """VGGs with 64 for every 4096 units of the fully connected layers."""
    from torch import nn

    original = nn.Linear.__init__

    def init(self, in_features: int, out_features: int, *args, **kwargs) -> None:
        original(self, *(64 if size == 4096 else size for size in (in_features, out_features)), *args, **kwargs)

    nn.Linear.__init__ = init  # not another class: code that asks for an nn.Linear must find one


def shrink_recipes(config: types.ModuleType) -> None:
    for recipe in (*config.RECIPES.values(), *config.PRESETS.values()):
        recipe.update(FEW | ({"size": 32} if "size" in recipe else {}))


PATCHES = {"vggfast.models": shrink_models, "vggfast.recipes.config": shrink_recipes}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of PATCHES where Python finds them, and has them patched once they are loaded."""

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in PATCHES else None
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_patch(module: types.ModuleType) -> None:
                load(module)
                PATCHES[name](module)

            spec.loader.exec_module = load_and_patch
        return spec


sys.meta_path.insert(0, Finder())
