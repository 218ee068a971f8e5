"""cola: chain of LoRAs, compared honestly. The idea is in `cola/chain.py`."""

import logging

from cola import environment

environment.settle()  # before anything imports torch

# bitsandbytes warns of optional kernels when it is imported, and once per matrix that it rounds the inputs of int8
# products to float16, as it always does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
