"""The data sets of the paper, in their published layouts (section 5)."""
