"""The series convolution in float64, written from its formula alone: what every implementation is
compared with.

It shares no code with ``gross_kernels`` and calls no convolution. Gradients are taken through it by
torch's autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def input_channels(in_channels: int, out_channels: int, group_size: int) -> Tensor:
    """Input channels that each output channel reads, ``start_s(o) + (0, …, s - 1)`` with
    ``start_s(o) = (o // (C_out·s/C_in))·s``: int64 ``[C_out, s]``."""
    starts = [
        o // (out_channels * group_size // in_channels) * group_size for o in range(out_channels)
    ]
    return torch.tensor([[start + c for c in range(group_size)] for start in starts])


def dense_weight(
    terms: Sequence[Tensor], active: int, gates: Tensor | None, in_channels: int
) -> Tensor:
    """``R_n`` as the dense convolution that it equals: float64 ``[C_out, C_in, kh, kw]``, zero
    outside the blocks."""
    out_channels, _, *kernel_size = terms[0].shape
    device = terms[0].device
    weight = torch.zeros(
        out_channels, in_channels, *kernel_size, dtype=torch.float64, device=device
    )
    rows = torch.arange(out_channels, device=device)[:, None]
    for i, term in enumerate(terms[:active]):
        channels = input_channels(in_channels, out_channels, term.shape[1]).to(device)
        value = term.double() if gates is None else gates[i].double() * term.double()
        weight = weight.index_put((rows, channels), value, accumulate=True)
    return weight


def series_conv2d(
    input: Tensor,
    terms: Sequence[Tensor],
    active: int,
    gates: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``out[n, o, y, x] = Σ_{c,i,j} R_n[o, c, i, j] · padded[n, c, y·stride + i·dilation, x·stride
    + j·dilation]``."""
    weight = dense_weight(terms, active, gates, input.shape[1])
    (kh, kw), (sy, sx), (py, px), (dy, dx) = weight.shape[2:], stride, padding, dilation
    padded = F.pad(input.double(), (px, px, py, py))
    height = (padded.shape[2] - dy * (kh - 1) - 1) // sy + 1
    width = (padded.shape[3] - dx * (kw - 1) - 1) // sx + 1
    output = padded.new_zeros(input.shape[0], weight.shape[0], height, width)
    for ky in range(kh):
        for kx in range(kw):
            rows = slice(ky * dy, ky * dy + (height - 1) * sy + 1, sy)
            columns = slice(kx * dx, kx * dx + (width - 1) * sx + 1, sx)
            output = output + torch.einsum(
                "oc,nchw->nohw", weight[:, :, ky, kx], padded[:, :, rows, columns]
            )
    return output
