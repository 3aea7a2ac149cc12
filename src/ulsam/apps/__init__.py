"""Programs that run until they are stopped: the HTTP service and the page of `ulsam explore`."""
