"""What other projects call, with their names, arguments and results; one module a project.

Nothing here is imported before it is asked for: ``import flcore.integrations.hrm``.
"""

from __future__ import annotations

__all__: list[str] = []
