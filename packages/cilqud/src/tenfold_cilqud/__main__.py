"""``python -m tenfold_cilqud``, also the entry for torchrun."""

from tenfold_cilqud.cli import main

main()
