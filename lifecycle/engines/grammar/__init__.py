"""Answers that must be JSON, match a schema or a regular expression, follow a grammar, or be one of a
list: what a request asks for becomes a `Constraint` here, by the library llguidance."""
