"""Folders, data-set names, the generated set, transforms and loaders."""
