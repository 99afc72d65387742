"""``python -m tenfold_slak``, also the entry for torchrun."""

from tenfold_slak.cli import main

main()
