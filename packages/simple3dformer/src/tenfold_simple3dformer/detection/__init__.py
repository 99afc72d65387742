"""Indoor detection (section 2.8): a detection transformer whose encoder is the image transformer."""
