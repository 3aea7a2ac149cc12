"""A trained net as an HTTP service: one process, one net, no state."""
