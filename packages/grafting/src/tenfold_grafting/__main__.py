"""``python -m tenfold_grafting``, also the entry for torchrun."""

from tenfold_grafting.cli import main

main()
