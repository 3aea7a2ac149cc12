"""A local web page on which nets can be asked about pictures: what they say, and what they look at."""
