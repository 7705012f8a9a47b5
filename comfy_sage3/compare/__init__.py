"""The A/B comparison: one prompt and one seed, through two precisions of attention, measured and shown."""
