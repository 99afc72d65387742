"""What the packages share and no paper is about: runs, checkpoints, claims, reports, data."""
