"""HyperGCL."""
