"""``python -m tenfold_nid``, also the entry for torchrun."""

from tenfold_nid.cli import main

main()
