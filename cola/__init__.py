"""cola: chain of LoRAs, compared honestly. The idea is in `cola/chain.py`."""
