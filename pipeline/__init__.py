"""Ghost Attention: teach a chat model to keep an instruction for a whole conversation.

The command is `gatt` (or `python -m pipeline`). The stages, in order: instructions, synthesize, train, export,
evaluate, report; then chat. Each reads files and writes files of one run folder.
"""

__version__ = "0.1.0"
