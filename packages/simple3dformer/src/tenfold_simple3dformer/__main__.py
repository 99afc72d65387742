"""``python -m tenfold_simple3dformer``, also the entry for torchrun."""

from tenfold_simple3dformer.cli import main

main()
