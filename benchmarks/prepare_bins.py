"""How well and how quickly sequences share rows. `prepare.py` calls it.

In: how many alpaca-like lengths. Out: seconds, fill, and how even rows and steps of 8 rows are in squared lengths.
"""

import time


def measure_bins(count: int) -> None:
    """Best fit of alpaca-like lengths."""
    import numpy as np

    from sft_core.pack import epoch_bins, pack_lengths

    drawn = np.exp(np.random.default_rng(0).normal(np.log(120), 0.75, count)).astype(int)
    lengths = np.clip(drawn, 20, 2048)
    started = time.perf_counter()
    bins = pack_lengths(lengths, 2048)
    between = time.perf_counter()
    epoch = epoch_bins(lengths, 2048, "best_fit", 42, 1)
    took, epoch_took = between - started, time.perf_counter() - between
    assert sum(map(len, bins)) == sum(map(len, epoch)) == count
    fill = lengths.sum() / (len(bins) * 2048)
    print(f"bins    {count} lengths in {took:.2f} s, an epoch in {epoch_took:.2f} s; fill {fill:.5f} (target 0.995)")
    squares = np.array([np.square(lengths[members]).sum() for members in epoch])
    steps = squares[: len(squares) // 8 * 8].reshape(-1, 8).sum(axis=1)
    for name, sums in (("row", squares), ("8 rows", steps)):
        print(
            f"  squares a {name}: variation {sums.std() / sums.mean():.3f}, max {sums.max() / sums.mean():.2f} of mean"
        )
