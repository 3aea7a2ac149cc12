"""Comparisons of many trained models, and the search for a smaller one."""
