"""``python -m tenfold_bip``, also the entry for torchrun."""

from tenfold_bip.cli import main

main()
