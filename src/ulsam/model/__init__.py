"""A model's spec, its file, presets and the trained models of the package."""
