"""How many values an encoder is best given at once: what `braid plan --sample N --tune` tries.

The batch size is part of a view's recipe, as it changes the last bits of vectors: it is found once, before the first run, and
written into the spec by whoever reads the plan. Nothing chooses it behind a person's back.
"""

from collections.abc import Callable, Mapping

from jobs.sizes import peak_bytes

__all__ = ["BATCHES", "told", "tried"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SLOWER = 0.8
"""A rate below this share of the best so far ends the search: larger batches only take more memory."""
GAIN = 1.1
"""What is told is worth a change of the spec from here on; less is the noise of a sample."""


def tried(rate_of: Callable[[int], float | None], budget_bytes: int, most: int) -> dict[int, float]:
    """Values a second by batch size, ascending, up to where it gets slower or no longer fits.

    Args:
        rate_of: encodes with batches of a size and gives values a second; None where memory did not hold them.
        budget_bytes: what this process may hold.
        most: the largest batch that the sample fills.
    """
    rates: dict[int, float] = {}
    for size in BATCHES:
        if size > most:
            break
        rate = rate_of(size)
        if rate is None or peak_bytes() > budget_bytes:
            break
        rates[size] = rate
        if rate < SLOWER * max(rates.values()):
            break
    return rates


def told(view: str, now: int, rates: Mapping[int, float]) -> str:
    """One line: the rates, and what to write into the spec where that is worth it."""
    if not rates:
        return f"views.{view}: not even a batch of {BATCHES[0]} fits into memory"
    listed = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
    best = max(rates, key=lambda size: rates[size])
    start = f"views.{view}: values a second by batch_size: {listed}"
    if best == now or (now in rates and rates[best] < GAIN * rates[now]):
        return f"{start}; {now} is as good as any"
    return f"{start}; put options: {{batch_size: {best}}} into the spec before the first run (it is part of the recipe)"
