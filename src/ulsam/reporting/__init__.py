"""Training reports: one page about one or several runs of `ulsam train`."""
