"""Edits of a model: where they fit, how they are made and undone, what they cost, folding, reconstruction."""
