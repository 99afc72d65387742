"""``python -m tenfold_toy``."""

from tenfold_toy.cli import main

main()
