"""Training recipes: `data` (what to train on), `train` (the loop), `checkpoint` (what `--resume` reads), `curve` (the plot).

`vggfast.recipes.train.fit(TrainConfig(...))` is the whole of it; `python -m vggfast train` is the same call.
"""

__all__ = ["RecipeError"]


class RecipeError(ValueError):
    """Something the user can put right: says what was expected, what came, and what to do. The CLI exits with 2."""
