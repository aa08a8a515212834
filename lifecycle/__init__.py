"""One config file takes a language model from raw text to an answered HTTP request."""

__version__ = "0.1.0"
