"""Calls of the sizes that matter on a GPU; tiny ones of the same kinds where a CPU plays it."""

import os
from dataclasses import replace

from case import Case

#: Whether a CPU plays the card (host_device.py).
DRY = os.environ.get("GROSS_CHECK_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"

COMMON = {"kernel_size": (3, 3), "padding": (1, 1), "channels_last": True}
POWERS = (1, 4, 16, 32, 64)
LARGER = {
    "64@56": Case(8, 64, 64, POWERS, size=(56, 56), active=3, **COMMON),
    "64@56, groups of 32": Case(8, 64, 64, POWERS, size=(56, 56), active=4, **COMMON),
    "64@56, groups of 64": Case(8, 64, 64, POWERS, size=(56, 56), active=5, gated=True, **COMMON),
    "128@28/2": Case(8, 128, 128, (1, 4, 16), size=(28, 28), stride=(2, 2), active=2, **COMMON),
    "512@7": Case(16, 512, 512, (1, 4, 16, 32), size=(7, 7), active=3, **COMMON),
    "32@30, contiguous": Case(
        4, 32, 32, (2, 8), (3, 3), (30, 29), padding=(1, 1), active=2, gated=True
    ),
}
if DRY:
    LARGER = {
        name: replace(
            case,
            batch=1,
            in_channels=16,
            out_channels=16,
            group_sizes=tuple(s for s in case.group_sizes if s <= 16),
            active=min(case.active, 3),
            size=(4, 5),
        )
        for name, case in LARGER.items()
    }
TYPICAL = LARGER["64@56"]
#: Of a layer: channels in and out, and the shape of its input.
WIDTHS, IMAGES = ((16, 16), (1, 16, 4, 4)) if DRY else ((64, 64), (4, 64, 14, 14))
