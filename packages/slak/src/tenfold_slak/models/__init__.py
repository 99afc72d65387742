"""Architectures: `slak.VARIANTS` by name, and timm's for the baselines."""

from typing import Any

from torch import nn

from tenfold_slak.models.slak import VARIANTS, create


def create_network(arch: str, **arguments: Any) -> nn.Module:
    """A SLaK variant or any network of timm, by name.

    Args:
        arch: a name of `VARIANTS` or of timm.
        arguments: of its constructor; `num_classes`, `in_chans` and `drop_path_rate` mean the same to all.

    Raises:
        ValueError: the name is unknown, or an argument is.

    """
    if arch in VARIANTS:
        return create(arch, **arguments)
    import timm  # noqa: PLC0415 - slow to import

    if not timm.is_model(arch):
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(VARIANTS)}, or a name of timm's")
    try:
        return timm.create_model(arch, **arguments)
    except TypeError as error:
        raise ValueError(f"{arch} does not take these arguments ({error})") from error
