"""Speed and memory beside other runtimes: what `python -m vggfast bench` and `pytest benchmarks` have in common.

`cases` says what is computed, `contenders` who computes it, `worker` is the process a contender lives in, `measure` checks and
times a group of them in interleaved rounds, `results` keeps what came out, `report` and `plots` show it.
"""

__all__ = ["BenchError"]


class BenchError(RuntimeError):
    """A measurement that cannot be made or must not be believed: says what was expected, what came, what to do."""
