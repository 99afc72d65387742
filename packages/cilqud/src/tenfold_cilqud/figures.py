"""Figures."""


def figures(claims, outcomes, folder):
    """None yet."""
    return []
