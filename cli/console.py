"""The console for tables and colours: rich's, whose texts are safe for a terminal (`sft_core.terminal`).

In: what rich prints. Out: the same; colours are those of the caller, never of a text that is printed.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from sft_core.terminal import is_safe, safe


class SafeConsole(Console):
    """Rich's console, whose texts are safe and whose colours are its own."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Segments, each text made safe."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or is_safe(text) else Segment(safe(text), style)
