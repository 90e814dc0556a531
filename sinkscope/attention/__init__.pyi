from .streaming import streaming as streaming

__all__ = ["streaming"]
