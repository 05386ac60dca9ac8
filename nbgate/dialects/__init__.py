"""The dialects that nbgate speaks, by name.

A dialect is one module of pure functions around the neutral words of `model`;
what is here is only the register. Heat: R.
"""

from __future__ import annotations

from typing import Final

from nbgate.dialects.claude import MESSAGES
from nbgate.dialects.embeddings import EMBEDDINGS, IMAGES, MODERATIONS
from nbgate.dialects.model import Dialect, Usage
from nbgate.dialects.openai_chat import CHAT, COMPLETIONS
from nbgate.dialects.openai_responses import RESPONSES

DIALECTS: Final[dict[str, Dialect]] = {
    dialect.name: dialect for dialect in (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS, MODERATIONS, IMAGES)
}

__all__ = ["DIALECTS", "Dialect", "Usage"]
