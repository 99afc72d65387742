"""A package in the tenfold pattern, small enough to prove the conformance suite with."""
