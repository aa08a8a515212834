"""The one abstraction: stages, artifacts, the store, recipes and the runner."""
