"""Run the fuzzer: python -m tests.fuzz."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from .run import main

sys.exit(main())
