from .scan import scan as scan

__all__ = ["scan"]
