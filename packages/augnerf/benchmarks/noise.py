"""What the miniature's salt and pepper does to its training pictures, in dB: how well the clean ones explain the noisy ones.

python benchmarks/noise.py --json results/studies/noise.json

Squared errors aim at the mean over the noise. Of N pixels, n are turned black and then n white, drawn with replacement, so that a
pixel ends up white with probability 1 - (1 - 1/N)^n and is left alone with (1 - 1/N)^(2n).
"""

import argparse
from pathlib import Path

from torch import Tensor

from tenfold_augnerf.data import DataConfig, load_data
from tenfold_augnerf.metrics import psnr_of_mean_mse
from tenfold_shared.checkpoint import write_json


def decibels(pictures: Tensor, others: Tensor) -> float:
    """PSNR of the mean squared error between pictures in [0, 1]."""
    return psnr_of_mean_mse((pictures - others).square().mean()[None])


def main() -> None:
    """Print the table, and keep it with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    data = load_data(DataConfig(name="blocks-mini", views=15, corruption="saltpepper", amount=options.ratio))
    noisy, clean = (views.colours.double() / 255 for views in (data.train, data.clean))
    pixels = noisy.shape[1] * noisy.shape[2]
    missed = (1 - 1 / pixels) ** int(pixels * options.ratio / 2)
    mean = missed**2 * clean + (1 - missed)
    found = {
        "clean as given": decibels(clean, noisy),
        "mean as given": decibels(mean, noisy),
        "mean to clean": decibels(mean, clean),
    }
    for name, value in found.items():
        print(f"{name:16}{value:7.2f} dB")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
