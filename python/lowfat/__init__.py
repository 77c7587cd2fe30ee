"""lowfat: low-rank and factorized transformers."""
