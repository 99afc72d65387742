"""ToST: train a sparse network better, whatever its mask, on any torch module."""
