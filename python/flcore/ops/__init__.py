"""Stateless functions with explicit buffers, one module a stem; `variant=` names the backend."""

from flcore.ops.combine import combine

__all__ = ["combine"]
