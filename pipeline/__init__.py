"""Ghost Attention: fine-tune a chat model to follow an instruction for the whole conversation.

The command is `gatt` (or `python -m pipeline`). The stages of a run, in order: instructions,
synthesize, train, export, evaluate, report. Each reads and writes files of one run folder.
"""

__version__ = "0.1.0"
