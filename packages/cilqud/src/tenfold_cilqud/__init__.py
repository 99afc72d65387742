"""CIL-QUD."""
