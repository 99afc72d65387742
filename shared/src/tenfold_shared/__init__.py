"""Everything in the tenfold packages that is not the paper."""
