"""``python -m tenfold_tost``, also the entry for torchrun."""

from tenfold_tost.cli import main

main()
