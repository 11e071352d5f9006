"""In: a model, its tokenizer and prompts (text, conversations or token ids). Out: text, whole or in pieces.

May import: data (chat templates), model, ops.
"""

from ropewalk.serve.conversation import Chat
from ropewalk.serve.engine import Completion, generate, stream

__all__ = ["Chat", "Completion", "generate", "stream"]
