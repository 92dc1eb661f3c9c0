"""How wrong a backend may be: a call on one of them, the same in float64 and by torch, and the rule
that compares them.

The tolerance rule: the error of a backend is at most twice the error that torch's own convolution
makes in the same precision, on the exactly summed weight, plus a tiny absolute term, see
:func:`tiny`."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import exact
import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

from gross_kernels.call import Call
from gross_kernels.dispatch import BACKENDS
from gross_kernels.series import Series

#: Of the input and of the terms.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
Arguments = tuple[Tensor, list[Tensor], Tensor | None, Tensor]


@dataclass(frozen=True)
class Target:
    """One backend on one device, for one dtype of the input and one of the terms."""

    backend: str
    device: str
    dtype: torch.dtype
    terms_dtype: torch.dtype

    def __str__(self) -> str:
        return "-".join([self.backend, self.device, str(self.dtype)[6:], str(self.terms_dtype)[6:]])

    def serves(self, case: Case) -> bool:
        """Whether the backend says so."""
        widths = (case.in_channels, case.out_channels)
        rest = (case.group_sizes, case.kernel_size, case.geometry, case.active)
        call = Call(self.device, self.dtype, self.terms_dtype, *widths, *rest)
        return BACKENDS[self.backend].supports(call)

    def arguments(self, case: Case) -> Arguments:
        """Input, terms, gates and an output gradient of the right dtypes, on the right device."""
        return case.tensors(self.dtype, self.terms_dtype, self.device)

    def run(
        self, case: Case, input: Tensor, terms: Sequence[Tensor], gates: Tensor | None, grad: Tensor
    ) -> list[Tensor]:
        """Output, gradient of the input, of each term, and of the gates if there are any."""
        backend = BACKENDS[self.backend]
        rest = (Series(terms, case.active, gates), case.geometry)
        grad_terms, grad_gates = backend.weight_grad(grad, input, *rest)
        results = [
            backend.forward(input, *rest),
            backend.input_grad(grad, input, *rest),
            *grad_terms,
        ]
        return results if gates is None else [*results, grad_gates]


def definition(
    case: Case, input: Tensor, terms: Sequence[Tensor], gates: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """The same list as ``Target.run``, in float64, where the arguments are: a GPU takes
    milliseconds for what takes a CPU seconds. Computed once for the same values."""
    given = (input, *terms, *([] if gates is None else [gates]), grad)
    key = (case, input.device, *map(digest, given))
    if key not in _definitions:
        if len(_definitions) == MOST_DEFINITIONS:
            _definitions.pop(next(iter(_definitions)))
        _definitions[key] = _definition(case, input, terms, gates, grad)
    return _definitions[key]


#: Results kept; a test asks for those of the same case at most four times, one after the other.
MOST_DEFINITIONS = 16
_definitions: dict[tuple, list[Tensor]] = {}


def digest(tensor: Tensor) -> bytes:
    """The same for the same values of the same dtype, in any memory format."""
    values = tensor.new_empty(tensor.shape, device="cpu").copy_(tensor.detach())
    return sha256(str(values.dtype).encode() + values.view(torch.uint8).numpy().tobytes()).digest()


def _definition(
    case: Case, input: Tensor, terms: Sequence[Tensor], gates: Tensor | None, grad: Tensor
) -> list[Tensor]:
    leaves = [
        t.detach().double().requires_grad_()
        for t in (input, *terms, *([] if gates is None else [gates]))
    ]
    gates = None if gates is None else leaves[-1]
    output = exact.series_conv2d(
        leaves[0], leaves[1 : len(terms) + 1], case.active, gates, *case.geometry
    )
    return [
        output.detach(),
        *torch.autograd.grad(output, leaves, grad.double(), materialize_grads=True),
    ]


def to_tf32(tensor: Tensor) -> Tensor:
    """The nearest numbers with TF32's 11 significant bits, ties to even."""
    bits = tensor.float().contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def library(
    case: Case,
    input: Tensor,
    terms: Sequence[Tensor],
    gates: Tensor | None,
    grad: Tensor,
    tf32: bool = False,
) -> list[Tensor]:
    """The same list from torch's convolution on the exactly summed weight, everything rounded to
    the input's dtype. With ``tf32`` factors are rounded to TF32 first.

    16-bit calls are computed in float32 and rounded once, which is stricter than torch's own: its
    bfloat16 input gradient adds in bfloat16. Without oneDNN: its bfloat16 weight gradient reads
    memory that nobody wrote where the image is narrower than the kernel (torch 2.10 and 2.15), and
    its bfloat16 convolution ends in a segmentation fault in torch 2.10 where no window along the
    width reads a pixel."""
    wide = torch.promote_types(input.dtype, torch.float32)
    host_gates = None if gates is None else gates.cpu()
    weight = exact.dense_weight([t.cpu() for t in terms], case.active, host_gates, input.shape[1])
    weight = weight.to(input.device, input.dtype).to(wide)
    if tf32:
        weight, input, grad = to_tf32(weight), to_tf32(input), to_tf32(grad)
    grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        output = F.conv2d(input.to(wide), weight, None, *case.geometry)
        if grad.numel():
            grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad.to(wide),
                input.to(wide),
                weight,
                None,
                *case.geometry,
                False,
                (0, 0),
                1,
                (True, True, False),
            )
    grad_terms = [torch.zeros_like(term) for term in terms]
    grad_gates = torch.zeros(len(terms), dtype=wide, device=input.device)
    rows = torch.arange(case.out_channels, device=input.device)[:, None]
    for i, term in enumerate(terms[: case.active]):
        channels = exact.input_channels(case.in_channels, case.out_channels, term.shape[1]).to(
            input.device
        )
        part = grad_weight[rows, channels]
        grad_terms[i] = part if gates is None else part * gates[i]
        grad_gates[i] = (part * term).sum()
    results = [output, grad_input, *grad_terms, *([] if gates is None else [grad_gates])]
    return [result.to(input.dtype) for result in results]


def tiny(dtype: torch.dtype, truth: Tensor, magnitude: Tensor) -> float:
    """The absolute term of the tolerance: one unit in the last place of the largest value, in its
    dtype, and four of the largest sum of magnitudes, in the dtype of accumulation (float32; float64
    for float64).

    The first is the rounding of the result, which may go one way here and the other way in torch.
    The second, 5e-7 of the sum in float32, is the error of products added one after another, for
    results of so few elements that torch's own error is next to zero."""
    rounding = torch.finfo(dtype).eps
    adding = min(rounding, torch.finfo(torch.float32).eps)
    return rounding * truth.abs().max().item() + 4 * adding * magnitude.abs().max().item()


def largest_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not a number."""
    return (value.to(truth.device).double() - truth).abs().nan_to_num(nan=torch.inf).max().item()


def assert_accurate(
    results: Sequence[Tensor], case: Case, arguments: Arguments, tf32: bool = False
) -> None:
    """Apply the tolerance rule to ``results``, a list as ``Target.run`` returns it; ``tf32``: of
    products in TF32."""
    input, terms, gates, grad = arguments
    positive = (
        input.abs(),
        [t.abs() for t in terms],
        None if gates is None else gates.abs(),
        grad.abs(),
    )
    columns = [
        [
            "output",
            "grad_input",
            *(f"grad_terms[{i}]" for i in range(len(terms))),
            *["grad_gates"] * case.gated,
        ],
        [input, input, *terms, *([] if gates is None else [gates])],
        results,
        definition(case, *arguments),
        definition(case, *positive),
        library(case, *arguments, tf32=tf32),
    ]
    for what, source, result, truth, magnitude, rival in zip(*columns, strict=True):
        assert result.shape == truth.shape, what
        assert result.dtype == source.dtype, what
        if truth.numel():
            error, theirs = largest_error(result, truth), largest_error(rival, truth)
            limit = 2 * theirs + tiny(input.dtype, truth, magnitude)
            assert error <= limit, (
                f"{what}: error {error:.3g}, torch's {theirs:.3g}, limit {limit:.3g}"
            )
