"""Calls that reach every Triton kernel in every way through it."""

from case import Case

#: Which cases use products of warp groups on Hopper, where Triton has open reports of invalid reads
#: of shared memory: the first, so that their values are known before all others on a card.
WARP_GROUP_CASES = (
    "groups of 64 in parts",
    "groups of 128 in blocks",
    "kernel too large for registers",
)
#: One case for each way to lay groups on the tile, each kernel, and each way through them.
CASES = {
    "groups of 64 in parts": Case(
        1, 64, 128, (8, 64), (1, 2), (3, 4), active=2, channels_last=True, gated=True
    ),
    "groups of 128 in blocks": Case(1, 128, 64, (128,), (1, 2), (3, 4), (2, 1), channels_last=True),
    "kernel too large for registers": Case(
        1, 32, 32, (2,), (7, 7), (8, 7), padding=(3, 3), channels_last=True
    ),
    "groups of 1 on a tile of 16": Case(
        2, 32, 32, (1,), (3, 3), (5, 6), padding=(1, 1), channels_last=True
    ),
    "many packs side by side": Case(
        1, 80, 80, (1, 4), (3, 3), (4, 5), padding=(1, 1), active=2, channels_last=True
    ),
    "the tile's own size": Case(
        1, 32, 32, (1, 4, 16), (3, 3), (5, 4), padding=(1, 1), active=3, gated=True
    ),
    "not a power of two": Case(
        2, 30, 30, (3, 15), (3, 2), (5, 4), padding=(1, 0), active=2, channels_last=True
    ),
    "5 of 16 lanes idle": Case(2, 11, 33, (11,), (2, 3), (5, 4), (2, 1), (1, 2), gated=True),
    "groups of 32": Case(
        1, 64, 64, (4, 32), (2, 2), (4, 5), padding=(1, 1), active=2, channels_last=True
    ),
    "groups of 18": Case(1, 36, 36, (9, 18), (3, 1), (5, 3), padding=(1, 0), active=2, gated=True),
    "depth multiplier": Case(
        1, 6, 72, (1, 2), (2, 2), (4, 5), active=2, gated=True, channels_last=True
    ),
    "fewer outputs": Case(2, 24, 6, (4, 8), (2, 2), (4, 5), padding=(1, 0), active=2),
    "five rows of sums": Case(1, 32, 32, (2,), (5, 5), (6, 7), padding=(2, 2), channels_last=True),
    "stride": Case(2, 32, 32, (4,), (3, 3), (7, 8), (2, 3), (1, 1), channels_last=True),
    "stride and dilation in common": Case(
        1, 16, 16, (4,), (3, 2), (9, 13), (4, 2), (2, 3), (2, 4), gated=True
    ),
    "dilation": Case(1, 16, 16, (2, 4), (3, 3), (8, 11), (1, 2), (3, 2), (2, 3), active=2),
    "rows in runs": Case(1, 16, 16, (4,), (3, 3), (40, 3), padding=(1, 1), channels_last=True),
}
