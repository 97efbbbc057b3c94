"""What a stage says while it runs, in lines and tables; and how far it is."""

from cache.terminal.output import say
from cache.terminal.progress import Progress, busy

__all__ = ["Progress", "busy", "say"]
