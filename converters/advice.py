"""transformers, imported without its advice to install torch: we want nothing of it that needs torch.

Its classes are imported when they are first named. Where torch is installed, `AutoTokenizer` brings it along
and takes ten seconds; a GGUF file's tokenizer does without.
"""

import logging

_level = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    import transformers
finally:
    logging.disable(_level)

__all__ = ["transformers"]
