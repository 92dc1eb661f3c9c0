"""The zoo: networks that people have, each with what it is called with, as small as it takes.

All weights are random: nothing is downloaded. A network is made in the process that checks it; this
list alone imports none of the packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from gross.decomposition.convert import Convert
from gross.example import Example
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """One entry of the zoo.

    Attributes:
        package: the one that the network is from, by the name that is imported.
        name: what the package calls it.
        make: makes it, with random weights.
        example: makes what it is called with.
        convert: makes the argument of :func:`gross.decompose`.
    """

    package: str
    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    example: Callable[[], Example] = field(repr=False)
    convert: Callable[[], Convert | None] = field(repr=False, default=lambda: None)

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"


def image(size: int, channels: int = 3) -> Tensor:
    """One square image of small numbers."""
    return torch.randn(1, channels, size, size)


def grey(size: int) -> Tensor:
    return image(size, 1)


def _torchvision(
    name: str,
    size: int = 64,
    part: str = "",
    example: Callable[[], Example] | None = None,
    **options: Any,
) -> Network:
    """One of torchvision's networks, from the part of ``torchvision.models``."""

    def make() -> nn.Module:
        made: nn.Module = getattr(import_module(f"torchvision.models{part}"), name)(
            weights=None, **options
        )
        return made

    return Network("torchvision", name, make, example or (lambda: image(size)))


def _timm(
    name: str, size: int = 64, convert: Callable[[], Convert | None] = lambda: None
) -> Network:
    return Network(
        "timm",
        name,
        lambda: import_module("timm").create_model(name, pretrained=False),
        lambda: image(size),
        convert,
    )


def _segmentation(name: str, encoder: str, size: int = 64) -> Network:
    return Network(
        "segmentation_models_pytorch",
        f"{name} ({encoder})",
        lambda: getattr(import_module("segmentation_models_pytorch"), name)(
            encoder, encoder_weights=None, classes=5
        ),
        lambda: image(size),
    )


def _transformers(
    name: str, config: str, example: Callable[[], Example], **options: Any
) -> Network:
    """A network of ``transformers``, made from a configuration alone."""

    def make() -> nn.Module:
        transformers = import_module("transformers")
        made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
        return made

    return Network("transformers", name, make, example)


def _built(
    package: str, path: str, example: Callable[[], Example], *args: Any, **options: Any
) -> Network:
    """A network that a class makes from arguments."""
    module, _, name = path.rpartition(".")

    def make() -> nn.Module:
        made: nn.Module = getattr(import_module(module), name)(*args, **options)
        return made

    return Network(package, name, make, example)


# The packages' own convolutions ------------------------------------------------------------------


class _TensorFlowPadding(nn.Module):
    """Pads as timm's ``Conv2dSame`` does, by the image's size."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = (conv.kernel_size, conv.stride, conv.dilation)

    def forward(self, image: Tensor) -> Tensor:
        padded: Tensor = import_module("timm.layers").pad_same(image, *self.geometry)
        return padded


def _plain(conv: nn.Conv2d, weight: Tensor, padding: Any) -> nn.Conv2d:
    made = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        padding,
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
    )
    made.weight, made.bias = nn.Parameter(weight.detach()), conv.bias
    return made


def _padded(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(_TensorFlowPadding(conv), _plain(conv, conv.weight, 0))


def _standardised(conv: Any) -> nn.Conv2d:
    rows = conv.weight.reshape(1, conv.out_channels, -1)
    gain = (conv.gain * conv.scale).view(-1)
    weight = nn.functional.batch_norm(rows, None, None, gain, None, True, 0.0, conv.eps)
    return _plain(conv, weight.reshape_as(conv.weight), conv.padding)


def _same_padding() -> Convert:
    return {import_module("timm.layers").Conv2dSame: _padded}


def _standardised_weights() -> Convert:
    return {import_module("timm.layers").ScaledStdConv2d: _standardised}


# The list ---------------------------------------------------------------------------------------


def _two_frames() -> tuple[Tensor, Tensor]:
    return image(128), image(128)


TORCHVISION = (
    _torchvision("alexnet", 96),
    _torchvision("vgg11_bn", 32),
    _torchvision("resnet18"),
    _torchvision("resnet50"),
    _torchvision("resnext50_32x4d"),
    _torchvision("densenet121"),
    _torchvision("googlenet", init_weights=False),
    _torchvision("inception_v3", 96, init_weights=True),
    _torchvision("squeezenet1_1"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("mobilenet_v2"),
    _torchvision("efficientnet_v2_s"),
    _torchvision("regnet_y_400mf"),
    _torchvision("convnext_tiny"),
    _torchvision("fcn_resnet50", part=".segmentation", weights_backbone=None),
    _torchvision("deeplabv3_resnet50", part=".segmentation", weights_backbone=None),
    _torchvision("lraspp_mobilenet_v3_large", part=".segmentation", weights_backbone=None),
    _torchvision("raft_small", part=".optical_flow", example=_two_frames),
    _torchvision(
        "fasterrcnn_resnet50_fpn",
        part=".detection",
        example=lambda: [torch.rand(3, 64, 64)],
        weights_backbone=None,
        min_size=64,
        max_size=64,
        box_score_thresh=0.0,
        rpn_nms_thresh=1.0,  # As many proposals whatever the weights, and so as many MACs.
        rpn_post_nms_top_n_test=10,
        num_classes=3,
    ),
    _torchvision(
        "retinanet_resnet50_fpn",
        part=".detection",
        example=lambda: [torch.rand(3, 64, 64)],
        weights_backbone=None,
        min_size=64,
        max_size=64,
        score_thresh=0.0,
        num_classes=3,
    ),
    _torchvision(
        "ssd300_vgg16",
        part=".detection",
        example=lambda: [torch.rand(3, 300, 300)],
        weights_backbone=None,
        score_thresh=0.0,
        num_classes=3,
    ),
)

NETWORKS = (
    *TORCHVISION,
    _timm("cspdarknet53"),
    _timm("dla34"),
    _timm("ese_vovnet19b_slim"),
    _timm("gernet_s"),
    _timm("hrnet_w18_small"),
    _timm("repvgg_a0"),
    _timm("res2net50_26w_4s"),
    _timm("resnest14d"),
    _timm("selecsls42"),
    _timm("seresnet18"),
    _timm("skresnet18"),
    _timm("xception41"),
    _timm("tf_efficientnetv2_b0", convert=_same_padding),
    _timm("eca_nfnet_l0", convert=_standardised_weights),
    _timm("vit_tiny_patch16_224", 224),
    _segmentation("Unet", "resnet18"),
    _segmentation("UnetPlusPlus", "resnet18"),
    _segmentation("MAnet", "resnet18"),
    _segmentation("Linknet", "resnet18"),
    _segmentation("FPN", "resnet18"),
    _segmentation("PSPNet", "resnet18"),
    _segmentation("PAN", "resnet18", 128),
    _segmentation("DeepLabV3Plus", "resnet18"),
    _segmentation("UPerNet", "resnet18"),
    _transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        lambda: image(64),
        layer_type="basic",
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
    ),
    _transformers(
        "DetrForObjectDetection",
        "DetrConfig",
        lambda: {"pixel_values": image(64)},
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        encoder_layers=1,
        decoder_layers=1,
        d_model=64,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    ),
    _transformers(
        "DPTForDepthEstimation",
        "DPTConfig",
        lambda: {"pixel_values": image(64)},
        image_size=64,
        initializer_range=0.1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[32, 64, 128, 128],
        fusion_hidden_size=64,
    ),
    _transformers(
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        lambda: {"pixel_values": image(32)},
        image_size=32,
        embed_dim=60,
        depths=[2, 2],
        num_heads=[2, 2],
    ),
    _transformers(
        "SuperPointForKeypointDetection",
        "SuperPointConfig",
        lambda: {"pixel_values": image(64)},
        keypoint_threshold=0.0,
    ),
    _transformers(
        "SegformerForSemanticSegmentation", "SegformerConfig", lambda: {"pixel_values": image(64)}
    ),
    _built(
        "diffusers",
        "diffusers.UNet2DModel",
        lambda: {"sample": image(32), "timestep": torch.tensor([10])},
        sample_size=32,
        block_out_channels=(32, 64, 64, 64),
    ),
    _built(
        "diffusers",
        "diffusers.UNet2DConditionModel",
        lambda: {
            "sample": image(32, 4),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": torch.randn(1, 7, 32),
        },
        sample_size=32,
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
    ),
    _built(
        "diffusers",
        "diffusers.AutoencoderKL",
        lambda: image(32),
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    _built("diffusers", "diffusers.AutoencoderTiny", lambda: image(32)),
    _built("diffusers", "diffusers.VQModel", lambda: image(32), block_out_channels=(64,)),
    _built(
        "monai",
        "monai.networks.nets.UNet",
        lambda: grey(64),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=2,
    ),
    _built(
        "monai",
        "monai.networks.nets.BasicUNet",
        lambda: grey(64),
        spatial_dims=2,
    ),
    _built(
        "monai",
        "monai.networks.nets.SegResNet",
        lambda: grey(64),
        spatial_dims=2,
        init_filters=16,
    ),
    _built(
        "monai",
        "monai.networks.nets.DynUNet",
        lambda: grey(64),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        kernel_size=(3, 3, 3, 3),
        strides=(1, 2, 2, 2),
        upsample_kernel_size=(2, 2, 2),
    ),
    _built(
        "monai",
        "monai.networks.nets.AttentionUnet",
        lambda: grey(64),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64),
        strides=(2, 2),
    ),
    _built("kornia", "kornia.feature.DISK", lambda: image(64)),
    _built("kornia", "kornia.feature.HardNet", lambda: grey(32), pretrained=False),
    _built("kornia", "kornia.feature.HyNet", lambda: grey(32), pretrained=False),
    _built("kornia", "kornia.feature.SOSNet", lambda: grey(32), pretrained=False),
    _built("kornia", "kornia.feature.TFeat", lambda: grey(32), pretrained=False),
    _built("kornia", "kornia.feature.xfeat.XFeatModel", lambda: image(64)),
    _built("kornia", "kornia.models.dexined.DexiNed", lambda: image(64), pretrained=False),
    _built("kornia", "kornia.models.rrdbnet.RRDBNet", lambda: image(16), 3, 3, num_block=2),
)
