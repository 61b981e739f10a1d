"""Training recipes: `data` (what to train on), `train` (the loop), `checkpoint` (atomic files), `curve` (the plot).

`vggfast.recipes.train.fit(TrainConfig(...))` is the whole of it; `python -m vggfast train` is the same call.
"""

__all__ = ["RecipeError", "printable"]


class RecipeError(ValueError):
    """Something the user can put right: says what was expected, what came, and what to do. The CLI exits with 2."""


def printable(name: object) -> str:
    """A path as text that every terminal and file takes: bytes that are no UTF-8 stand in it as \\udce9."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")
