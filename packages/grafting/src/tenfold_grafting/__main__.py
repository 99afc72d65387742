"""``python -m tenfold_grafting``, and what torchrun starts."""

from tenfold_grafting.cli import main

main()
