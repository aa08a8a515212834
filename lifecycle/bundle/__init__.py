"""What is served: a folder with a model, its tokeniser, and a manifest of every byte.

Opening a bundle needs nothing but `lifecycle.pipeline`, so that a server does not carry what
made the model.
"""

from lifecycle.bundle.manifest import verify_bundle

__all__ = ["verify_bundle"]
