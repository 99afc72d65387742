"""``python -m tenfold_gnt``, also the entry for torchrun."""

from tenfold_gnt.cli import main

main()
