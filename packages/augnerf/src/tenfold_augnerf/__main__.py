"""``python -m tenfold_augnerf``, also the entry for torchrun."""

from tenfold_augnerf.cli import main

main()
