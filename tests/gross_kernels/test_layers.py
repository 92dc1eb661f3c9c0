"""``GroSSConv2d`` where ``nn.Conv2d`` was, and the series at every group size."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing._internal import common_nn
from torch.testing._internal.common_modules import module_db

import gross_kernels
from gross_kernels import GroSSConv2d, SeriesConv2d
from gross_kernels.geometry import padded_size

FORMATS = [torch.contiguous_format, torch.channels_last]
SIZES = (1, 2, 4, 8)


def torch_cases() -> Iterator[tuple[str, nn.Conv2d, Tensor]]:
    """PyTorch's own convolutions of one group, with their inputs: name, module, input."""
    for entry in common_nn.get_new_module_tests():
        name = entry.get("fullname") or entry["module_name"]
        if name.startswith("Conv2d"):
            make = entry.get("constructor") or (
                lambda entry=entry: nn.Conv2d(*entry["constructor_args"])
            )
            conv = make()
            if conv.groups == 1:
                yield (
                    "_".join([name, *filter(None, [entry.get("desc")])]),
                    conv,
                    torch.randn(entry["input_size"]),
                )
    (info,) = (info for info in module_db if info.module_cls is nn.Conv2d)
    for i, case in enumerate(info.module_inputs_func(info, "cpu", torch.float32, False, False)):
        made, given = case.constructor_input, case.forward_input
        yield f"module_db_{i}_{case.desc}", nn.Conv2d(*made.args, **made.kwargs), given.args[0]


torch.manual_seed(0)
TORCH_CASES = list(torch_cases())
every_torch_case = pytest.mark.parametrize(
    ("conv", "input"), [c[1:] for c in TORCH_CASES], ids=[c[0] for c in TORCH_CASES]
)


def arguments(conv: nn.Conv2d) -> tuple:
    """What ``conv`` was made with, in ``nn.Conv2d``'s order."""
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
    )


def same_function(conv: nn.Conv2d) -> GroSSConv2d:
    """The layer that computes what ``conv`` computes: identities around its weight."""
    eye_in, eye_out = (torch.eye(n)[..., None, None] for n in (conv.in_channels, conv.out_channels))
    return GroSSConv2d.from_bottlenecks(conv, {conv.in_channels: (eye_in, conv.weight, eye_out)})


def bottlenecks(
    conv: nn.Conv2d, width: tuple[int, int], sizes: tuple[int, ...]
) -> dict[int, tuple[Tensor, ...]]:
    """Independent random bottlenecks of one convolution."""
    return {
        s: (
            torch.randn(width[0], conv.in_channels, 1, 1),
            torch.randn(width[1], s, *conv.kernel_size),
            torch.randn(conv.out_channels, width[1], 1, 1),
        )
        for s in sizes
    }


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


# In the place of nn.Conv2d ----------------------------------------------------------------------


def test_torch_has_cases() -> None:
    """Catches a filter above that misses PyTorch's cases: 10 of one group by argument, 3 by word, 4
    by module."""
    assert len(TORCH_CASES) == 17


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@every_torch_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_in_values(conv: nn.Conv2d, input: Tensor, dtype: torch.dtype) -> None:
    """Catches stride, padding, padding mode, dilation or bias that mean something else than in
    ``nn.Conv2d``."""
    conv = copy.deepcopy(conv).to(dtype)
    layer = same_function(conv)
    inputs = [input.to(dtype, copy=True).requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((layer, conv), inputs, strict=True)]
    assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad)
    assert_close(layer.grouped[0].grad, conv.weight.grad)
    if conv.bias is not None:
        assert_close(layer.bias.grad, conv.bias.grad)


@every_torch_case
@pytest.mark.parametrize("of_input", FORMATS)
@pytest.mark.parametrize("of_module", FORMATS)
@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
def test_drop_in_formats(
    kind: type[nn.Module],
    conv: nn.Conv2d,
    input: Tensor,
    of_input: torch.memory_format,
    of_module: torch.memory_format,
) -> None:
    """Catches an output, or a gradient of the input, of another shape or memory format than
    ``nn.Conv2d``'s."""
    made = arguments(conv)
    layer = (
        GroSSConv2d(*made)
        if kind is GroSSConv2d
        else SeriesConv2d(*made[:6], *made[8:], group_sizes=made[:1])
    )
    seen = []
    for module in (conv, layer):
        x = input.to(memory_format=of_input, copy=True) if input.dim() == 4 else input.clone()
        output = copy.deepcopy(module).to(memory_format=of_module)(x.requires_grad_())
        (grad,) = torch.autograd.grad(output.sum(), x)
        for tensor in (output, grad):
            # The strides of a tensor without elements mean nothing.
            formats = (
                [tensor.is_contiguous(memory_format=f) for f in FORMATS]
                if tensor.dim() == 4 and len(input)
                else []
            )
            seen.append((tensor.shape, tensor.dtype, formats))
    assert seen[:2] == seen[2:]


def test_same_signature() -> None:
    """Catches an argument of ``nn.Conv2d`` that is missing, renamed, moved or has another
    default."""
    theirs, ours = (inspect.signature(kind).parameters for kind in (nn.Conv2d, GroSSConv2d))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[name].default for name in theirs] == [
        parameter.default for parameter in theirs.values()
    ]
    assert [name for name in ours if ours[name].kind == inspect.Parameter.KEYWORD_ONLY] == [
        "group_sizes",
        "width",
        "relu",
    ]


@pytest.mark.parametrize("shape", [(2, 8, 6, 7), (8, 6, 7)])
@pytest.mark.parametrize("of_module", FORMATS)
def test_unbatched_and_formats(shape: tuple[int, ...], of_module: torch.memory_format) -> None:
    """Catches an unbatched input whose output has other strides than ``nn.Conv2d`` gives it."""
    modules = nn.Conv2d(8, 8, 3), GroSSConv2d(8, 8, 3)
    outputs = [module.to(memory_format=of_module)(torch.randn(shape)) for module in modules]
    assert outputs[0].stride() == outputs[1].stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """Catches a layer that is not made in, or moved to, a dtype as a whole."""
    input = torch.randn(2, 8, 5, 5, dtype=dtype)
    moved = GroSSConv2d(8, 4, 3, group_sizes=SIZES).to(dtype)
    assert GroSSConv2d(8, 4, 3, dtype=dtype)(input).dtype == dtype
    assert {p.dtype for p in moved.parameters()} == {dtype}
    assert_close(moved(input), moved.fold()(input), 0.05 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_with_float32_parameters(dtype: torch.dtype) -> None:
    """Catches parameters that must be cast by hand, and gradients that lose the parameters'
    dtype."""
    layer = GroSSConv2d(8, 4, 3, group_sizes=SIZES)
    input = torch.randn(2, 8, 5, 5)
    output = layer(input.to(dtype))
    assert output.dtype == dtype
    assert_close(output.float(), layer(input), 0.05)
    output.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_meta_device_and_materialisation() -> None:
    """Catches ``active`` being made on the default device, or parameters that do not follow
    ``to_empty``."""
    with torch.device("meta"):
        layer = GroSSConv2d(8, 4, 3, group_sizes=SIZES)
        layer.group_size = 2
        assert layer(torch.empty(1, 8, 5, 5)).shape == (1, 4, 3, 3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(1, 8, 5, 5)).isfinite().all()


def test_default_device_of_fold() -> None:
    """Catches a fold that makes tensors on the default device instead of the layer's."""
    layer = GroSSConv2d(8, 4, 3, group_sizes=SIZES)
    with torch.device("meta"):
        folded = layer.fold(2)
    assert {p.device.type for p in folded.parameters()} == {"cpu"}


# At every group size ----------------------------------------------------------------------------

LAYERS = {
    "plain": (nn.Conv2d(6, 5, 3), (8, 8), SIZES),
    "unequal": (nn.Conv2d(6, 5, (3, 2), (2, 1), (1, 2), (1, 2), bias=False), (12, 8), (3, 6, 12)),
    "circular": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), (8, 8), (2, 4)),
    "reflect": (
        nn.Conv2d(6, 5, (2, 3), padding="same", padding_mode="reflect"),
        (8, 16),
        (1, 4, 8),
    ),
    "same": (nn.Conv2d(6, 5, (4, 3), padding="same", dilation=(1, 2)), (14, 7), (2, 14)),
    "valid": (nn.Conv2d(6, 5, 1, padding="valid"), (7, 7), (7,)),
}
every_layer = pytest.mark.parametrize(("conv", "width", "sizes"), LAYERS.values(), ids=LAYERS)


@every_layer
def test_from_bottlenecks(conv: nn.Conv2d, width: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Catches a series that does not give every independent bottleneck back (equations 5 and 6)."""
    given = bottlenecks(conv, width, sizes)
    layer = GroSSConv2d.from_bottlenecks(conv, dict(reversed(given.items())))
    assert layer.group_sizes == sizes
    assert layer.group_size == sizes[-1]
    input = torch.randn(2, 6, 9, 8)
    for size, (p, r, q) in given.items():
        layer.group_size = size
        geometry = (
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            width[0] // size,
            False,
        )
        middle = nn.Conv2d(*width, *geometry, conv.padding_mode)
        middle.weight = nn.Parameter(r)
        expected = nn.functional.conv2d(middle(nn.functional.conv2d(input, p)), q, conv.bias)
        torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-3)


@every_layer
def test_fold(conv: nn.Conv2d, width: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Catches three plain convolutions that compute something else than the layer, at any size or
    mode."""
    layer = GroSSConv2d(*arguments(conv), group_sizes=sizes, width=width).eval()
    input = torch.randn(2, 6, 9, 8)
    for size in sizes:
        layer.group_size = size
        folded = layer.fold()
        assert [type(part) for part in folded] == [nn.Conv2d] * 3
        assert [part.groups for part in folded] == [1, width[0] // size, 1]
        assert not folded.training
        assert_close(folded(input), layer(input))
    layer.group_size = sizes[0]
    assert_close(layer.fold(sizes[-1])(input), folded(input), 0)


def test_fold_copies() -> None:
    """Catches folded convolutions that share memory with the layer: training one would change the
    other."""
    layer = GroSSConv2d(4, 4, 3, group_sizes=(4,))
    pointers = {p.data_ptr() for p in layer.parameters()}
    assert all(p.requires_grad and p.data_ptr() not in pointers for p in layer.fold().parameters())


def test_from_bottlenecks_copies() -> None:
    """Catches a layer that shares memory with the convolution or the bottlenecks that it was made
    from."""
    conv = nn.Conv2d(4, 4, 3)
    given = bottlenecks(conv, (4, 4), (4,))
    layer = GroSSConv2d.from_bottlenecks(conv, given)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for weight in (*given[4], conv.bias):
            weight.zero_()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@every_layer
def test_gates(conv: nn.Conv2d, width: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Catches gates that do not scale all three series: gates (1, …, 1, 0, …, 0) equal a smaller
    size."""
    layer = GroSSConv2d(*arguments(conv), group_sizes=sizes, width=width)
    input = torch.randn(2, 6, 9, 8)
    for active, size in enumerate(sizes, 1):
        layer.group_size = sizes[-1]
        gates = torch.tensor([1.0] * active + [0.0] * (len(sizes) - active), requires_grad=True)
        gated = layer(input, gates)
        layer.group_size = size
        assert_close(gated, layer(input))
        assert torch.autograd.grad(gated.square().sum(), gates)[0].isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
def test_nothing_leaks_from_inactive_terms(gated: bool) -> None:
    """Catches an inactive term of any series that is read, forward or backward, even if multiplied
    by zero."""
    layer = GroSSConv2d(8, 8, 3, group_sizes=SIZES)
    layer.group_size = 2
    input, gates = torch.randn(2, 8, 5, 5), torch.rand(4).requires_grad_() if gated else None
    leaves = [*layer.parameters(), *([gates] if gated else [])]
    results = []
    for _ in range(2):
        output = layer(input, gates)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        with torch.no_grad():
            for series in (layer.pointwise_in, layer.grouped, layer.pointwise_out):
                for term in series[2:]:
                    term.fill_(torch.nan)
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_gates_scale_each_series_once() -> None:
    """Catches a gate that is left out of one series: one term, gate 2, is 8 times the output."""
    layer = GroSSConv2d(4, 4, 3, bias=False, group_sizes=(4,))
    input = torch.randn(2, 4, 5, 5)
    assert_close(layer(input, torch.tensor([2.0])), 8 * layer(input))
    core = SeriesConv2d(4, 4, 3, group_sizes=(4,))
    assert_close(core(input, torch.tensor([2.0])), 2 * core(input))


@every_layer
def test_macs(conv: nn.Conv2d, width: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Catches a count that differs from torch's count of what runs, plus one per output element for
    a bias; and work that the folded layer does not have, but for a border that is padded first."""
    layer = GroSSConv2d(*arguments(conv), group_sizes=sizes, width=width)
    input = torch.randn(1, 6, 9, 8)
    for size in sizes:
        layer.group_size = size
        output, macs = counted(layer, input)
        bias = output.numel() if conv.bias is not None else 0
        assert layer.macs((9, 8), size) == macs + bias
        if conv.padding_mode == "zeros" and conv.padding != "same":
            assert counted(layer.fold(size), input)[1] == macs
    assert layer.macs((9, 8)) == layer.macs((9, 8), sizes[-1])


def counted(module: nn.Module, input: Tensor) -> tuple[Tensor, int]:
    """A module's output, and the MACs of it by torch's count."""
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        output = module(input)
    return output, counter.get_total_flops() // 2


MODES = ("reflect", "replicate", "circular")
#: Geometry, and the size of a map that is padded first or, at the end, after the first pointwise.
PADDED = {
    "first": ({"kernel_size": 3, "padding": 1}, (9, 8), True),
    "one side": ({"kernel_size": (2, 3), "padding": "same"}, (6, 5), True),
    "just": ({"kernel_size": 3, "padding": 2, "dilation": 2}, (6, 5), True),
    "above": ({"kernel_size": 3, "padding": 2, "dilation": 2}, (5, 5), False),
    "stride": ({"kernel_size": (5, 3), "padding": (3, 2), "stride": (2, 1)}, (4, 4), False),
    "kernel": ({"kernel_size": 7, "padding": 3}, (4, 5), False),
    "same": ({"kernel_size": (4, 6), "padding": "same", "dilation": (2, 1)}, (4, 6), False),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("geometry", "size", "first"), PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("fused", [True, False])
def test_padding_modes(
    mode: str, geometry: dict, size: tuple[int, int], first: bool, fused: bool
) -> None:
    """Catches padding after the first pointwise that is not padding before it, in values and in
    gradients, and products on a border that is most of the map, or that ``macs`` does not count."""
    layer = GroSSConv2d(6, 5, padding_mode=mode, group_sizes=(1, 4), width=(8, 8), **geometry)
    layer = layer.double().eval()
    input = torch.randn(2, 6, *size, dtype=torch.float64)
    for group_size in (1, 4):
        layer.group_size = group_size
        folded = layer.fold()
        with gross_kernels.use_fused(fused):
            inputs = [input.clone().requires_grad_() for _ in range(2)]
            output, expected = (f(x) for f, x in zip((layer, folded), inputs, strict=True))
            assert_close(output, expected, 1e-12)
            sought = [inputs[0], layer.pointwise_in[0], layer.grouped[0], layer.pointwise_out[0]]
            found = torch.autograd.grad(output.square().sum(), [*sought, layer.bias])
            first_conv, middle, last = folded
            weights = [inputs[1], first_conv.weight, middle.weight, last.weight, last.bias]
            grads = list(torch.autograd.grad(expected.square().sum(), weights))
            if group_size == 4:
                # The first term lies in blocks of one channel on the diagonal of the second's.
                own = torch.arange(8) % 4
                grads[2] = grads[2][torch.arange(8), own][:, None]
            for one, other in zip(found, grads, strict=True):
                assert_close(one, other, 1e-11)
            images, macs = counted(layer, input)
            assert 2 * layer.macs(size) == macs + images.numel()
            _, after = counted(folded, input)
            border = padded_size(size, layer._padding_per_side())
            extra = math.prod(border) - math.prod(size) if first else 0
            assert macs == after + 2 * 8 * 6 * extra
            with torch.inference_mode():
                assert_close(layer.pack()(input), expected, 1e-12)
                assert_close(layer(input[0]), expected[0], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_padding_modes_keep_the_memory_format(mode: str) -> None:
    """Catches an output of another memory format than the input's where padding comes later."""
    layer = GroSSConv2d(4, 4, 7, padding=3, padding_mode=mode)
    for layout in (torch.contiguous_format, torch.channels_last):
        output = layer(torch.randn(2, 4, 4, 4).to(memory_format=layout))
        assert output.is_contiguous(memory_format=layout)


def test_macs_by_hand() -> None:
    """Catches MACs of the paper's layer that are wrong: 64 channels at 56×56, group size 4."""
    layer = GroSSConv2d(64, 64, 3, padding=1, bias=False, group_sizes=(1, 4, 16, 32))
    assert layer.macs(56, 4) == 56 * 56 * 64 * (64 + 4 * 9 + 64)
    core = SeriesConv2d(64, 64, 3, stride=2, padding=1)
    assert core.macs(56, 4) == 28 * 28 * 64 * 4 * 9


def test_default_sizes_and_width() -> None:
    """Catches defaults other than all powers of two that divide the width, and the input's channels
    as the width."""
    layer = GroSSConv2d(24, 10, 3)
    assert (layer.width, layer.group_sizes, layer.group_size) == ((24, 24), (1, 2, 4, 8), 8)
    assert GroSSConv2d(24, 10, 3, width=16).group_sizes == (1, 2, 4, 8, 16)
    assert GroSSConv2d(24, 10, 3, width=(16, 4)).group_sizes == (4, 8, 16)


# Initialisation ---------------------------------------------------------------------------------


def assert_variance_of_a_convolution(
    layers: list[nn.Module], group_size: int | None = None
) -> None:
    """The mean output variance of fresh layers without bias, relative to 1/3 of the input's, is 1:
    ``nn.Conv2d``'s.

    The mean over the layers, 60 of them, each on an input of its own, has a standard error below 3
    % (checked) and may be off by 4 standard errors. A variance that is wrong by a factor of 1.15
    fails."""
    values = []
    for layer in layers:
        if group_size is not None:
            layer.group_size = group_size
        with torch.no_grad():
            values.append(3 * layer(torch.randn(4, 32, 6, 6)).var(correction=0))
    error = torch.stack(values).std() / math.sqrt(len(values))
    mean = torch.stack(values).mean()
    assert error < 0.03
    assert abs(mean - 1) < 4 * error, f"{mean:.3f} ± {error:.3f} at group size {group_size}"


def test_variance_of_a_convolution() -> None:
    """Catches a yardstick that ``nn.Conv2d`` itself does not meet."""
    assert_variance_of_a_convolution([nn.Conv2d(32, 48, 3, bias=False) for _ in range(60)])


@pytest.mark.parametrize("width", [None, 16, (64, 32)])
def test_fresh_layer_has_the_variance_of_a_convolution(width: int | tuple[int, int] | None) -> None:
    """Catches an initialisation under which a group size starts with another output variance than
    ``nn.Conv2d``."""
    layers = [GroSSConv2d(32, 48, 3, bias=False, width=width) for _ in range(60)]
    for size in layers[0].group_sizes:
        assert_variance_of_a_convolution(layers, size)


def test_fresh_core_has_the_variance_of_a_convolution() -> None:
    """Catches the same in ``SeriesConv2d``."""
    layers = [SeriesConv2d(32, 32, 3) for _ in range(60)]
    for size in layers[0].group_sizes:
        assert_variance_of_a_convolution(layers, size)


def test_fresh_bias() -> None:
    """Catches a bias outside the bound of ``nn.Conv2d``, 1/√(fan-in), or far inside it."""
    biases = torch.cat([GroSSConv2d(8, 64, 3, group_sizes=(8,)).bias for _ in range(20)])
    bound = 1 / math.sqrt(8 * 9)
    assert 0.98 * bound < biases.abs().max() <= bound


@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
def test_reset_parameters(kind: type[nn.Module]) -> None:
    """Catches weights that do not follow the seed, or that reset_parameters leaves as they were."""
    torch.manual_seed(1)
    layer = kind(8, 8, 3)
    drawn = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert all(not torch.equal(value, drawn[name]) for name, value in layer.state_dict().items())
    torch.manual_seed(1)
    layer.reset_parameters()
    assert all(torch.equal(value, drawn[name]) for name, value in layer.state_dict().items())


# As a module ------------------------------------------------------------------------------------


def layers() -> list[nn.Module]:
    return [
        GroSSConv2d(8, 6, (3, 2), 2, 1, bias=False, group_sizes=SIZES, width=(8, 16)),
        GroSSConv2d(8, 6, 3, padding=1, padding_mode="circular"),
        SeriesConv2d(8, 16, 3, dilation=2),
    ]


every_kind = pytest.mark.parametrize("layer", layers(), ids=["narrow", "circular", "core"])


@every_kind
def test_copies(layer: nn.Module) -> None:
    """Catches a copy, pickled or deep, that loses parameters or its group size, or shares them with
    the original."""
    input = torch.randn(2, 8, 7, 7)
    layer.group_size = 2
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    expected = layer(input)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for made in copies:
        assert made.group_size == 2
        assert torch.equal(made(input), expected)
        made.group_size = 4
        assert layer.group_size == 2
        assert torch.equal(layer(input), expected)
        assert made._active is not layer._active


@every_kind
def test_state_dict(layer: nn.Module) -> None:
    """Catches a state_dict with more or less than the parameters, or that cannot be loaded with
    weights_only."""
    names = {name for name, _ in layer.named_parameters()}
    assert set(layer.state_dict()) == names
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    input = torch.randn(2, 8, 7, 7)
    assert torch.equal(other(input), layer(input))


def test_parameter_names() -> None:
    """Catches a rename that would make saved networks unreadable."""
    layer = GroSSConv2d(4, 4, 3, group_sizes=(2, 4))
    names = [
        f"{series}.{i}" for series in ("pointwise_in", "grouped", "pointwise_out") for i in range(2)
    ]
    assert set(layer.state_dict()) == {*names, "bias"}
    assert set(SeriesConv2d(4, 4, 3, group_sizes=(2, 4)).state_dict()) == {"terms.0", "terms.1"}


def test_extra_repr() -> None:
    """Catches a representation that hides what the layer was made with."""
    layer = GroSSConv2d(
        8,
        6,
        (3, 2),
        2,
        1,
        (1, 2),
        bias=False,
        padding_mode="circular",
        group_sizes=SIZES,
        width=(8, 16),
    )
    layer.group_size = 4
    assert layer.extra_repr() == (
        "8, 6, kernel_size=(3, 2), stride=(2, 2), padding=(1, 1), dilation=(1, 2), "
        "padding_mode=circular, group_sizes=(1, 2, 4, 8), group_size=4, width=(8, 16), bias=False"
    )
    assert SeriesConv2d(8, 16, 3).extra_repr() == (
        "8, 16, kernel_size=(3, 3), stride=(1, 1), group_sizes=(1, 2, 4, 8), group_size=8"
    )


@every_kind
def test_group_size_moves_with_the_layer(layer: nn.Module) -> None:
    """Catches ``active`` being moved, cast or listed with the parameters: it stays an int64 on the
    host."""
    layer = copy.deepcopy(layer).double().to("meta")
    assert layer._active.device.type == "cpu"
    assert layer._active.dtype == torch.int64
    assert not list(layer.buffers())


def test_training_is_possible() -> None:
    """Catches parameters that gradients do not reach: one layer learns another one's function at
    every size."""
    target, layer = (GroSSConv2d(4, 4, 3, group_sizes=(1, 2, 4)).double() for _ in range(2))
    optimiser = torch.optim.Adam(layer.parameters(), 0.02)
    input = torch.randn(16, 4, 6, 6, dtype=torch.float64)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for size in (1, 2, 4):
            layer.group_size = target.group_size = size
            loss = loss + nn.functional.mse_loss(layer(input), target(input).detach())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("release", [False, True])
def test_release_inactive(release: bool) -> None:
    """Catches inactive weights that momentum or weight decay move; without the release they do
    move."""
    layer = GroSSConv2d(8, 8, 3, group_sizes=SIZES)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    input = torch.randn(2, 8, 5, 5)

    def step() -> None:
        optimiser.zero_grad()
        layer(input).square().mean().backward()
        if release:
            layer.release_inactive()
        optimiser.step()

    step()
    layer.group_size = 2
    before = copy.deepcopy(layer.state_dict())
    step()
    for name, value in layer.state_dict().items():
        inactive = name != "bias" and int(name.rpartition(".")[2]) >= 2
        assert torch.equal(value, before[name]) == (inactive and release), name


def test_parametrised_bias() -> None:
    """Catches a layer that reads its parameters past torch's mechanisms."""

    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    layer = GroSSConv2d(4, 4, 3)
    input = torch.randn(1, 4, 5, 5)
    expected = layer(input) + layer.bias.detach()[:, None, None]
    parametrize.register_parametrization(layer, "bias", Doubled())
    assert_close(layer(input), expected)


def test_core_is_the_middle_of_the_layer() -> None:
    """Catches a core that computes something else than the layer between its pointwise
    convolutions."""
    layer, core = GroSSConv2d(8, 8, 3, padding=1, bias=False), SeriesConv2d(8, 8, 3, padding=1)
    core.terms = layer.grouped
    input = torch.randn(2, 8, 5, 5)
    for size in SIZES:
        layer.group_size = core.group_size = size
        first, _, last = layer.fold()
        assert_close(last(core(first(input))), layer(input))
