"""Ways to lay a four-dimensional tensor out in memory, by name: its values stay."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "window": lambda t: F.pad(t.contiguous(), (1, 2, 3, 0))[:, :, 3:, 1:-2],
    "channels_last_window": lambda t: F.pad(t, (1, 2, 3, 0)).to(memory_format=torch.channels_last)[
        :, :, 3:, 1:-2
    ],
    "channels": lambda t: torch.cat([t, t], 1).contiguous()[:, : t.shape[1]],
    "channels_last_channels": lambda t: torch.cat([t, t], 1).to(memory_format=torch.channels_last)[
        :, t.shape[1] :
    ],
    "every_second_column": lambda t: torch.repeat_interleave(t, 2, 3)[..., ::2],
    "transposed_image": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "transposed_batch": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}
