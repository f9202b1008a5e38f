"""What is wrong with a file for ``ray up``, found before money is spent. No network, no AWS."""

from __future__ import annotations

__all__ = ["check", "summary"]
