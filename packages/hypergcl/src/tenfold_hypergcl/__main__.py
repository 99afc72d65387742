"""``python -m tenfold_hypergcl``, also the entry for torchrun."""

from tenfold_hypergcl.cli import main

main()
