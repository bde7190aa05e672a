"""The networks of the literature, whole and in their wrappers, for configurations to start from.

    network=presets.EDM2_S
    network=with_model(presets.DDPMPP_CIFAR10, dropout=0.2)
    network=presets.MEANFLOW_XL_2.replace(second="end")

Dropout and label dropout are those of the original training; `fastflow networks` prints all of
them beside their published sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastflow.config import Lazy, lazy
from fastflow.presets import Preset
from fastflow.wrappers import EDMDenoiser, NoiseDenoiser, VelocityNetwork
from networks.adm_unet import DhariwalUNet
from networks.dit import DiT
from networks.edm2 import EDM2UNet, LogVariance
from networks.song_unet import SongUNet

_IMAGENET = 1000  # classes
_EDM = "arXiv 2206.00364, table 7, as NVIDIA FastGen counts it"


def with_model(network: Lazy, **arguments: Any) -> Lazy:
    """The same network with some arguments of its raw network changed, checked again."""
    return network.replace(model=network.model.replace(**arguments))


# DDPM++, NCSN++ and ADM as EDM trains them (arXiv 2206.00364, tables 7 and 8)

_NCSNPP: dict[str, Any] = {
    "embedding": "fourier",
    "channel_mult_noise": 2,
    "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}

DDPMPP_CIFAR10: Lazy = lazy(
    EDMDenoiser,
    model=lazy(
        SongUNet,
        resolution=32,
        augment_dim=9,  # of EDM's augmentation labels, which its weights have a layer for
        channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.13,
    ),
)
"""Unconditional."""
DDPMPP_CIFAR10_COND: Lazy = with_model(DDPMPP_CIFAR10, cond_dim=10)
NCSNPP_CIFAR10: Lazy = with_model(DDPMPP_CIFAR10, **_NCSNPP)
NCSNPP_CIFAR10_COND: Lazy = with_model(NCSNPP_CIFAR10, cond_dim=10)
DDPMPP_FFHQ: Lazy = with_model(
    DDPMPP_CIFAR10, resolution=64, channel_mult=(1, 2, 2, 2), dropout=0.05
)
DDPMPP_AFHQV2: Lazy = with_model(DDPMPP_FFHQ, dropout=0.25)
ADM_IMAGENET64: Lazy = lazy(
    EDMDenoiser,
    model=lazy(
        DhariwalUNet,
        resolution=64,
        cond_dim=_IMAGENET,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
    ),
)

_AUGMENTED = "has a layer for augmentation labels"
_EDM_PRESETS = (
    Preset(
        name="ddpmpp-cifar10", network=DDPMPP_CIFAR10, parameters=55.7, source=_EDM, note=_AUGMENTED
    ),
    Preset(name="ddpmpp-cifar10-cond", network=DDPMPP_CIFAR10_COND, source=_EDM, note=_AUGMENTED),
    Preset(name="ncsnpp-cifar10", network=NCSNPP_CIFAR10, source=_EDM, note=_AUGMENTED),
    Preset(name="ncsnpp-cifar10-cond", network=NCSNPP_CIFAR10_COND, source=_EDM, note=_AUGMENTED),
    Preset(name="ddpmpp-ffhq", network=DDPMPP_FFHQ, source=_EDM, note=_AUGMENTED),
    Preset(name="ddpmpp-afhqv2", network=DDPMPP_AFHQV2, source=_EDM, note=_AUGMENTED),
    Preset(name="adm-imagenet64", network=ADM_IMAGENET64, parameters=295.9, source=_EDM),
)


# EDM2, configuration G (arXiv 2312.02696, tables 2 and 6)


def _edm2(channels: int, dropout: float, *, channels_in: int = 3) -> Lazy:
    model = lazy(
        EDM2UNet,
        resolution=64,
        in_channels=channels_in,
        cond_dim=_IMAGENET,
        channels=channels,
        dropout=dropout,
    )
    return lazy(EDMDenoiser, model=model, sigma_data=0.5, logvar_head=lazy(LogVariance))


def _latent(network: Lazy) -> Lazy:
    """The same for ImageNet-512 in latents of 4 x 64 x 64."""
    return with_model(network, in_channels=4)


EDM2_XS: Lazy = _edm2(128, 0.0)
"""ImageNet-64, as all without LATENT in their names."""
EDM2_S: Lazy = _edm2(192, 0.0)
EDM2_M: Lazy = _edm2(256, 0.1)
EDM2_L: Lazy = _edm2(320, 0.1)
EDM2_XL: Lazy = _edm2(384, 0.1)
EDM2_XXL: Lazy = _edm2(448, 0.1)
EDM2_LATENT_XS: Lazy = _latent(EDM2_XS)
"""ImageNet-512 in latents of 4 x 64 x 64, scaled to standard deviation 0.5, as all LATENT ones."""
EDM2_LATENT_S: Lazy = _latent(EDM2_S)
EDM2_LATENT_M: Lazy = _latent(EDM2_M)
EDM2_LATENT_L: Lazy = _latent(EDM2_L)
EDM2_LATENT_XL: Lazy = _latent(EDM2_XL)
EDM2_LATENT_XXL: Lazy = _latent(EDM2_XXL)


def _edm2_presets(
    size: str, images: Lazy, latents: Lazy, parameters: float, gmacs: float
) -> Iterator[Preset]:
    for data, network in (("imagenet64", images), ("imagenet512", latents)):
        yield Preset(
            name=f"edm2-{data}-{size}",
            network=network,
            parameters=parameters,
            gmacs=gmacs,
            source="arXiv 2312.02696, table 6",
            note="for 512 x 512; its cost has element-wise operations too",
        )


_EDM2_PRESETS = (
    *_edm2_presets("xs", EDM2_XS, EDM2_LATENT_XS, 124.7, 45.5),
    *_edm2_presets("s", EDM2_S, EDM2_LATENT_S, 280.2, 102.2),
    *_edm2_presets("m", EDM2_M, EDM2_LATENT_M, 497.8, 180.8),
    *_edm2_presets("l", EDM2_L, EDM2_LATENT_L, 777.5, 282.2),
    *_edm2_presets("xl", EDM2_XL, EDM2_LATENT_XL, 1119.3, 405.9),
    *_edm2_presets("xxl", EDM2_XXL, EDM2_LATENT_XXL, 1523.2, 552.1),
)


# Transformers on ImageNet-256 in latents of 4 x 32 x 32 (arXiv 2212.09748, table 1)

_SIZES: dict[str, dict[str, int]] = {
    "s": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "b": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "m": {"hidden_size": 1024, "depth": 16, "num_heads": 16},  # of MeanFlow
    "l": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def _transformer(size: str, patch_size: int, **arguments: Any) -> Lazy:
    return lazy(
        DiT, resolution=32, patch_size=patch_size, cond_dim=_IMAGENET, **_SIZES[size], **arguments
    )


def _dit(size: str, patch_size: int) -> Lazy:
    model = _transformer(size, patch_size, learn_sigma=True, label_dropout=0.1)
    return lazy(NoiseDenoiser, model=model)


def _sit(size: str, patch_size: int) -> Lazy:
    model = _transformer(size, patch_size, learn_sigma=True, label_dropout=0.1)
    return lazy(VelocityNetwork, model=model, data_at=1)


def _mean_flow(size: str, patch_size: int) -> Lazy:
    return lazy(VelocityNetwork, model=_transformer(size, patch_size, two_times=True))


DIT_S_2: Lazy = _dit("s", 2)
"""With a learned variance, as all DIT and SIT ones."""
DIT_S_4: Lazy = _dit("s", 4)
DIT_S_8: Lazy = _dit("s", 8)
DIT_B_2: Lazy = _dit("b", 2)
DIT_B_4: Lazy = _dit("b", 4)
DIT_B_8: Lazy = _dit("b", 8)
DIT_L_2: Lazy = _dit("l", 2)
DIT_L_4: Lazy = _dit("l", 4)
DIT_L_8: Lazy = _dit("l", 8)
DIT_XL_2: Lazy = _dit("xl", 2)
DIT_XL_4: Lazy = _dit("xl", 4)
DIT_XL_8: Lazy = _dit("xl", 8)
SIT_S_2: Lazy = _sit("s", 2)
SIT_B_2: Lazy = _sit("b", 2)
SIT_L_2: Lazy = _sit("l", 2)
SIT_XL_2: Lazy = _sit("xl", 2)
MEANFLOW_B_4: Lazy = _mean_flow("b", 4)
"""Of two times, in latents like all MEANFLOW transformers."""
MEANFLOW_B_2: Lazy = _mean_flow("b", 2)
MEANFLOW_M_2: Lazy = _mean_flow("m", 2)
MEANFLOW_L_2: Lazy = _mean_flow("l", 2)
MEANFLOW_XL_2: Lazy = _mean_flow("xl", 2)
MEANFLOW_CIFAR10: Lazy = lazy(
    VelocityNetwork,
    model=DDPMPP_CIFAR10.model.replace(augment_dim=6, dropout=0.2, two_times=True),
)
"""Without preconditioning, of two times; six augmentation labels (arXiv 2505.13447, appendix A)."""


def _transformers(
    family: str, source: str, *rows: tuple[str, Lazy, float, float | None]
) -> Iterator[Preset]:
    for name, network, parameters, gmacs in rows:
        yield Preset(
            name=f"{family}-{name}",
            network=network,
            parameters=parameters,
            gmacs=gmacs,
            source=source,
        )


_DIT_PRESETS = _transformers(
    "dit",
    "arXiv 2212.09748, table 4",
    ("s-2", DIT_S_2, 33, 6.06),
    ("s-4", DIT_S_4, 33, 1.41),
    ("s-8", DIT_S_8, 33, 0.36),
    ("b-2", DIT_B_2, 130, 23.01),
    ("b-4", DIT_B_4, 130, 5.56),
    ("b-8", DIT_B_8, 131, 1.42),
    ("l-2", DIT_L_2, 458, 80.71),
    ("l-4", DIT_L_4, 458, 19.70),
    ("l-8", DIT_L_8, 459, 5.01),
    ("xl-2", DIT_XL_2, 675, 118.64),
    ("xl-4", DIT_XL_4, 675, 29.05),
    ("xl-8", DIT_XL_8, 676, 7.39),
)
_SIT_PRESETS = _transformers(
    "sit",
    "arXiv 2401.08740, table 1",
    ("s-2", SIT_S_2, 33, None),
    ("b-2", SIT_B_2, 130, None),
    ("l-2", SIT_L_2, 458, None),
    ("xl-2", SIT_XL_2, 675, None),
)
_MEANFLOW_PRESETS = _transformers(
    "meanflow",
    "arXiv 2505.13447, table 4",
    ("b-4", MEANFLOW_B_4, 131, 5.6),
    ("b-2", MEANFLOW_B_2, 131, 23.1),
    ("m-2", MEANFLOW_M_2, 308, 54.0),
    ("l-2", MEANFLOW_L_2, 459, 80.9),
    ("xl-2", MEANFLOW_XL_2, 676, 119.0),
)

PRESETS: tuple[Preset, ...] = (
    *_EDM_PRESETS,
    *_EDM2_PRESETS,
    *_DIT_PRESETS,
    *_SIT_PRESETS,
    *_MEANFLOW_PRESETS,
    Preset(
        name="meanflow-cifar10",
        network=MEANFLOW_CIFAR10,
        parameters=55.8,
        source="NVIDIA FastGen, configuration EDM/mf_cifar10",
    ),
)
"""What `fastflow networks` prints."""
